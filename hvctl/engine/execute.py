"""Runs one plan under one lock with one row in the journal: whole, or undone, or left for recovery; never half.

Order (operations.md): lock, recover a dead owner's leftovers, observe, decide, row and mark, steps with fault points,
close. "Done" is answered only after the row is closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hvctl.engine.faults import Faults
from hvctl.engine.hands import apply
from hvctl.engine.lock import VmLock
from hvctl.engine.snapshothands import ADVISORY
from hvctl.errors import BusyError, DeadlineError, HvctlError, UnreachableError
from hvctl.model.operation import Kind, Phase, StepRecord
from hvctl.model.plan import Audit, Destroy, Enter, LoadState, Pause, Plan, Resume, SetRecord, Start, Step
from hvctl.model.snapshot import Snapshot
from hvctl.model.stepwords import step_detail, step_name
from hvctl.model.vm import Vm
from hvctl.ports import Host

Progress = Callable[[str], None]
UNKNOWN = (DeadlineError, UnreachableError, BusyError)
# What these have done cannot be taken back: once one of their steps is done, recovery finishes them.
FORWARD = (Kind.STOP, Kind.DELETE, Kind.SNAPSHOT_DELETE)
# Of these, once one of these steps is done: the process of the guest has ended, or its RAM is in the new one alone.
ENDED = {Kind.INTERRUPT: ("save_guest", "end_guest", "destroy"), Kind.RESUME: ("start", "continue_guest")}
STEP_ERRORS = (HvctlError, OSError)


class StepError(Exception):
    """A step failed; what the operation is now stands in the fields.

    unknown: nobody can say whether the effect happened, so the operation stays open for recovery.
    torn: the guest is paused with mixed state and must not run. undo_failed: texts of failed inverses."""

    def __init__(self, step: Step, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.step = step
        self.cause = cause
        self.unknown = False
        self.torn = False
        self.undo_failed: list[str] = []

    @property
    def message(self) -> str:
        return self.cause.message if isinstance(self.cause, HvctlError) else f"{self.cause}."

    @property
    def hint(self) -> str | None:
        return self.cause.hint if isinstance(self.cause, HvctlError) else None


@dataclass
class Execution:
    """One run of a plan's steps: what went, how long it took, and how to take it back.

    vm: as observed when the operation began. kept_memory: bytes that the guest stopped at when a partial result is
    kept; then that is what is promised. bound: see Applied. mended: what was wrong and is right again. stopped and
    continued: when the guest was paused and went on last, in seconds of the monotonic clock; paused: for how long in
    all."""

    host: Host
    lock: VmLock
    faults: Faults
    margin: int
    operation: int
    kind: Kind
    progress: Progress
    vm: Vm | None = None
    recovering: bool = False
    phase: Phase = Phase.BEGUN
    records: list[StepRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kept_memory: int | None = None
    mended: list[str] = field(default_factory=list)
    stopped: float | None = None
    continued: float | None = None
    paused: float = 0.0
    bound: Snapshot | None = None
    _inverses: list[Step] = field(default_factory=list)

    def run(self, plan: Plan | Sequence[Step]) -> None:
        """Every step in order; StepError if one fails, after everything that could be taken back was."""
        for step in plan.steps if isinstance(plan, Plan) else plan:
            if isinstance(step, Enter):
                self._enter(step.phase)
                continue
            try:
                self._one(step)
            except STEP_ERRORS as e:
                # Not what could be had or not, but the end of the guest: nothing may call that done.
                if isinstance(step, ADVISORY) and not (isinstance(e, UnreachableError) and self._process_ended()):
                    message = e.message if isinstance(e, HvctlError) else str(e)
                    self.warnings.append(message)
                    continue
                raise self._failed(step, e) from e

    def _process_ended(self) -> bool:
        """Whether the process that the operation began with is surely gone."""
        try:
            return self.vm is not None and self.host.domains.get(self.vm.uuid).process != self.vm.process
        except HvctlError:
            return False

    def _enter(self, phase: Phase) -> None:
        self.faults.point(self._kind, phase.value, "before")
        self.lock.mark(self.operation, phase)
        self.phase = phase
        if phase is Phase.COMMITTED or (phase is Phase.TOUCHING and self.kind is Kind.RESET):
            self._inverses.clear()
        self.faults.point(self._kind, phase.value, "after")

    @property
    def _kind(self) -> str:
        return f"recover-{self.kind.value}" if self.recovering else self.kind.value

    def _one(self, step: Step) -> None:
        if isinstance(step, SetRecord) and step.record and self.kept_memory is not None:
            step = replace(step, record=step.record.with_memory(self.kept_memory))
        step = self._bound(step)
        name = step_name(step)
        self.progress(f"{name.replace('_', ' ')} {step_detail(step)}".rstrip())
        began = time.monotonic()
        try:
            self.faults.point(self._kind, name, "before")
            applied = apply(self.host, step, self.margin, self.vm)
            if applied.inverse is not None:
                self._inverses.append(applied.inverse)
            if applied.facts.get("partial") and not self.recovering:
                self.kept_memory = applied.facts["reached"]
            if applied.warning:
                self.warnings.append(applied.warning)
            if applied.mended:
                self.mended.append(applied.mended)
            self.bound = applied.bound or self.bound
            self._seen_anew(step)
            if isinstance(step, Pause):
                self.stopped = applied.stopped
            elif isinstance(step, Resume):
                self.continued = applied.continued
                if self.stopped is not None and self.continued is not None:
                    self.paused += self.continued - self.stopped
            self._record(step, began, "done", applied.facts)
            self.faults.point(self._kind, name, "after")
        except STEP_ERRORS as e:
            self._record(step, began, f"failed: {e}", {})
            raise

    def _bound(self, step: Step) -> Step:
        """The step with the snapshot as it is since its process is known."""
        bound = self.bound
        if bound is None:
            return step
        named = [f.name for f in fields(step) if isinstance(s := getattr(step, f.name), Snapshot) and s.id == bound.id]
        known: dict[str, Any] = dict.fromkeys(named, bound)
        return replace(step, **known) if known else step

    def _seen_anew(self, step: Step) -> None:
        """What was observed at first is of another process."""
        if isinstance(step, Start | Destroy):
            self.vm = None

    def _record(self, step: Step, began: float, outcome: str, facts: dict[str, object]) -> None:
        seconds = time.monotonic() - began
        self.records.append(StepRecord(step_name(step), step_detail(step), seconds, outcome, facts))

    def _failed(self, step: Step, cause: Exception) -> StepError:
        error = StepError(step, cause)
        # A load that failed has left a dead machine; anything else of a reset may be done again from the start.
        if self.kind is Kind.RESET and isinstance(step, LoadState | Audit) and not isinstance(cause, UNKNOWN):
            error.torn = True
        elif self.recovering and self._irreversible and not isinstance(cause, UNKNOWN):
            # Repeating a reset is the recovery of it: where that surely fails, nothing else is left to try.
            error.torn = True
        elif isinstance(cause, UNKNOWN) or self.phase is Phase.COMMITTED or self._irreversible:
            error.unknown = True
        elif self.recovering:
            # These steps were the undoing: taking them back would lead to the half state again.
            error.undo_failed.append(f"{step_name(step)}: {cause}")
        else:
            self._unwind(error)
        return error

    @property
    def _irreversible(self) -> bool:
        if self.recovering or self.phase is not Phase.TOUCHING:
            return self.kind is Kind.RESET and self.phase is Phase.TOUCHING
        done = {r.name for r in self.records if r.outcome == "done"}
        forward = (self.kind in FORWARD and done) or done.intersection(ENDED.get(self.kind, ()))
        return self.kind is Kind.RESET or bool(forward)

    def _unwind(self, error: StepError) -> None:
        while self._inverses:
            inverse = self._inverses.pop()
            began = time.monotonic()
            name = step_name(inverse)
            self.progress(f"undo: {name.replace('_', ' ')} {step_detail(inverse)}".rstrip())
            try:
                self.faults.point(f"undo-{self._kind}", name, "before")
                apply(self.host, inverse, self.margin, self.vm)
                self._seen_anew(inverse)
                self._record(inverse, began, "undone", {})
                self.faults.point(f"undo-{self._kind}", name, "after")
            except STEP_ERRORS as e:
                self._record(inverse, began, f"undo failed: {e}", {})
                error.undo_failed.append(f"{name}: {e}")
