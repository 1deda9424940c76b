"""Engine: the one door through which a VM is changed. A verb says what it wants as a decision from facts to a plan;
the engine does it under lock, row and mark, and answers how it ended."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hvctl import codec
from hvctl.adapters.store.store import Store
from hvctl.decide.admission import admit, holders
from hvctl.decide.needs import promised_need
from hvctl.engine.execute import Execution, Progress, StepError
from hvctl.engine.faults import Faults
from hvctl.engine.handover import capacity, pool_move
from hvctl.engine.learned import learned
from hvctl.engine.lock import VmLock, vm_lock
from hvctl.engine.observe import observe, observe_all
from hvctl.engine.recover import recover_vm
from hvctl.errors import BusyError, HvctlError, NotFoundError, NotUndoneError, RefusedError, UndoneError
from hvctl.model.allocation import Record, Resources, resources
from hvctl.model.host import FORGET, Forget, HostFacts, Ledger, Promise
from hvctl.model.operation import Before, Kind, Operation, OpState, Outcome, Phase
from hvctl.model.plan import Enter, Plan, Refusal
from hvctl.model.pool import Need
from hvctl.model.stepwords import step_detail, step_name
from hvctl.model.vm import Process, Vm
from hvctl.ports import Host
from hvctl.settings import Settings

ENDS_QUARANTINE = (Kind.STOP, Kind.DELETE)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a verb decided: the plan, and what the ledger says after it.

    goal: what is promised afterwards (None: as before). holds: whether the VM then counts against the host.
    forget: the VM is gone afterwards."""

    plan: Plan
    before: Before
    goal: Record | None = None
    holds: bool = False
    forget: bool = False
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def wanted(self) -> Resources | None:
        """What must be free on the host before the first step; None asks for nothing."""
        if not self.goal or not self.holds:
            return None
        return resources(self.goal.allocation) if self.before.left is None else self.before.left


Decide = Callable[[Vm | None], Decision | Refusal]


class Engine:
    """One hypervisor and its journal, opened for one command or one daemon.

    needs(vm, gap) predicts what a VM needs when it comes back after `gap` seconds; clock is seconds since 1970, which
    reservations are kept by, since they outlive every process and boot."""

    def __init__(self, settings: Settings, host: Host, store: Store, progress: Progress = lambda _: None) -> None:
        self.settings = settings
        self.host = host
        self.store = store
        self.progress = progress
        self.faults = Faults()
        self.facts: HostFacts = host.domains.facts()
        self.needs: Callable[[Vm, float], Need] = promised_need
        self.clock: Callable[[], float] = time.time
        self.who = os.environ.get("SUDO_USER") or _user()

    def preview(self, kind: Kind, ref: str | None, name: str, decide: Decide) -> Outcome:
        """What change() would do now: the same decision and the same admission, no effect."""
        with self._released():
            vm = self._observed(ref) if ref else None
            decision = _decided(decide(vm))
        check = self._admission(vm, decision.wanted, vm.uuid if vm else "", vm.name if vm else name)
        if check:
            check(self.store.ledger(self.facts.name))
        return self._outcome(kind, vm.uuid if vm else "", name if vm is None else vm.name, None, decision)

    def change(
        self, kind: Kind, ref: str, request: dict[str, Any], decide: Decide, *, key: str | None = None, new: str = ""
    ) -> Outcome:
        """Run one operation on the VM `ref` (of a VM to create: its uuid, and its name in `new`)."""
        if known := self._known(key):
            return self._replayed(kind, known)
        self.sweep()
        began = time.monotonic()
        uuid = ref if new else self.host.domains.uuid(ref)
        with self._released(), vm_lock(self.settings.locks_dir, uuid, self.settings.lock_wait) as lock:
            recover_vm(self, lock, uuid)
            if known := self._known(key):
                return self._replayed(kind, known)
            vm = None if new else self._observed(uuid)
            name = vm.name if vm else new
            try:
                decision = _decided(decide(vm))
            except RefusedError:
                # The same request, a moment ahead of this one, may be what stands in its way.
                if known := self._known(key):
                    return self._replayed(kind, known)
                raise
            if not decision.plan.steps:
                return self._outcome(kind, uuid, name, OpState.DONE, decision)
            self._refuse_quarantined(kind, uuid, vm)
            return self._run(lock, kind, uuid, name, request, decision, key, began)

    def _run(
        self,
        lock: VmLock,
        kind: Kind,
        uuid: str,
        name: str,
        request: dict[str, Any],
        decision: Decision,
        key: str | None,
        began: float,
    ) -> Outcome:
        operation = self.store.open_operation(
            vm_uuid=uuid,
            vm_name=name,
            host=self.facts.name,
            kind=kind,
            request=request,
            before=codec.dump(decision.before),
            who=self.who,
            boot_id=self.facts.boot_id,
            key=key,
            admit=self._admission(decision.before.vm, decision.wanted, uuid, name),
            held=decision.wanted,
        )
        if key and (operation.state is not OpState.OPEN or operation.vm_uuid != uuid):
            return self._replayed(kind, self._known(key) or operation)
        self.faults.point(kind.value, "row", "after")
        lock.mark(operation.id, Phase.BEGUN)
        self.faults.point(kind.value, "begun", "after")
        margin = self.settings.memory_margin
        run = Execution(self.host, lock, self.faults, margin, operation.id, kind, self.progress, vm=decision.before.vm)
        try:
            run.run(decision.plan)
        except StepError as e:
            self._failed(lock, operation, run, e)
        if run.kept_memory is not None and decision.goal:
            goal = decision.goal.with_memory(run.kept_memory)
            result = decision.result | {"after": codec.dump(goal.allocation)}
            decision = replace(decision, goal=goal, result=result)
        decision = replace(decision, result=decision.result | learned(run, began))
        outcome = self._outcome(kind, uuid, name, OpState.DONE, decision, operation.id, run, time.monotonic() - began)
        self.store.close_operation(
            operation.id,
            OpState.FAILED if run.mended else OpState.DONE,
            reason=" ".join(run.mended) or None,
            result={**outcome.result, **_said(outcome)},
            steps=run.records,
            promise=_promise(uuid, name, decision),
            record=decision.goal,
            move=None if run.mended else pool_move(self, kind, decision.before, OpState.DONE),
        )
        self.faults.point(kind.value, "closed", "after")
        lock.clear()
        if run.mended:
            raise HvctlError(
                f"{decision.plan.goal} is done, but not as it should be: {' '.join(run.mended)}",
                f"hvctl operation show {operation.id}",
            )
        return outcome

    def _failed(self, lock: VmLock, operation: Operation, run: Execution, error: StepError) -> None:
        """Close the row as what it is, and tell the operator; always raises."""
        what = f"{operation.kind} of {operation.vm_name} failed at {step_name(error.step)}: {error.message}"
        lost = operation.kind is Kind.RESET and self._process_ended(operation)
        if error.unknown and not lost:
            raise NotUndoneError(
                f"{what} The result is unknown, so the operation stays open.", "hvctl recover ends it"
            ) from error.cause
        kind: type[NotUndoneError | UndoneError | RefusedError]
        if lost:
            state, kind, tail = OpState.FAILED, NotUndoneError, "The QEMU process has ended, and with it the guest."
        elif error.torn:
            state, kind, tail = OpState.QUARANTINED, NotUndoneError, "The guest stays paused: its memory is mixed."
        elif error.undo_failed:
            state, kind = OpState.FAILED, NotUndoneError
            tail = f"Not undone: {'; '.join(error.undo_failed)}."
        else:
            # What could not even be begun is refused, though something had to be tried to find that out.
            refused = isinstance(error.cause, RefusedError) and run.phase is Phase.BEGUN
            state, kind, tail = OpState.UNDONE, RefusedError if refused else UndoneError, "Everything is as it was."
        self.store.close_operation(operation.id, state, reason=f"{error.message} {tail}", steps=run.records)
        lock.clear()
        hint = f"hvctl vm start {operation.vm_name} boots it from its disks" if lost else error.hint
        if error.torn and not lost:
            hint = f"hvctl vm stop {operation.vm_name} --force, then start it: it boots from its disks"
        raise kind(f"{what} {tail}", hint) from error.cause

    def _process_ended(self, operation: Operation) -> bool:
        """Whether the VM's QEMU is surely not the one that the operation began with."""
        before = codec.load(Before, operation.before)
        try:
            now = self.host.domains.get(operation.vm_uuid)
        except HvctlError:
            return False
        return before.vm is not None and now.process != before.vm.process

    def sweep(self) -> list[Operation]:
        """Recover every operation whose owner is dead; those that cannot be observed now stay open."""
        ended = []
        for operation in self.store.open_operations(self.facts.name):
            try:
                with self._released(), vm_lock(self.settings.locks_dir, operation.vm_uuid, 0) as lock:
                    closed = recover_vm(self, lock, operation.vm_uuid)
            except BusyError:
                continue
            except HvctlError as e:
                self.progress(f"operation {operation.id} stays open: {e.message}")
                continue
            if closed:
                ended.append(closed)
        return ended

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """Whatever becomes of an operation, its QEMU process is let go."""
        try:
            yield
        finally:
            self.host.machine.release()

    def _admission(
        self, vm: Vm | None, want: Resources | None, uuid: str, name: str
    ) -> Callable[[Ledger], None] | None:
        """The check that opening the row makes; what is observed is read before, so that nothing slow happens under
        the host's lock. Nobody else is looked at for a VM that runs and asks for no more than it was promised: that is
        never refused, and its promise changes only under its own lock."""
        if want is None:
            return None
        if vm is not None and vm.state.active:
            own = self.store.promise_of(self.facts.name, uuid)
            if own is not None and own.holds and own.resources.largest(want) == own.resources:
                return None
        observed = observe_all(self.host)
        most, now = capacity(self), self.clock()

        def check(ledger: Ledger) -> None:
            held = holders(ledger, self.looked_again(ledger, observed))
            refusal = admit(most, held, uuid, want, ledger.reservations, name, now)
            if refusal:
                raise RefusedError(refusal.message, refusal.hint)

        return check

    def looked_again(self, ledger: Ledger, observed: Sequence[Vm]) -> list[Vm]:
        """A VM that was off a moment ago, and is promised room now, may have been started in between: a look under the
        host's lock decides. There are few such VMs, since a stop takes the promise away."""
        promised = {p.vm_uuid for p in ledger.promised if p.holds and not p.busy}
        seen = []
        for vm in observed:
            if vm.uuid in promised and not vm.state.active:
                with contextlib.suppress(NotFoundError):
                    seen.append(self.host.domains.get(vm.uuid))
            else:
                seen.append(vm)
        return seen

    def _observed(self, ref: str) -> Vm:
        """The VM as it is; what the domain's metadata lost of the promise, the database still knows."""
        vm = observe(self.host, ref, guest=True)
        if vm.record is not None:
            return vm
        return replace(vm, record=self.store.record_of(self.facts.name, vm.uuid))

    def _refuse_quarantined(self, kind: Kind, uuid: str, vm: Vm | None) -> None:
        """Only another QEMU process ends a quarantine: a later operation that was undone does not."""
        if kind in ENDS_QUARANTINE or vm is None or vm.process is None:
            return
        last = next(iter(self.store.operations(self.facts.name, uuid, OpState.QUARANTINED, limit=1)), None)
        if last is None:
            return
        before, found = codec.load(Before, last.before), (last.result or {}).get("process")
        if vm.process in (before.vm and before.vm.process, found and codec.load(Process, found)):
            raise RefusedError(
                f"{vm.name} is quarantined since operation {last.id}: {last.reason}",
                f"hvctl vm stop {vm.name} --force, then start it",
            )

    def _known(self, key: str | None) -> Operation | None:
        """The operation of this key once it has ended: its owner is waited for, or, when it is dead, recovered."""
        known = self.store.operation_of_key(self.facts.name, key) if key else None
        if known is None or known.state is not OpState.OPEN:
            return known
        with vm_lock(self.settings.locks_dir, known.vm_uuid, self.settings.lock_wait) as lock:
            recover_vm(self, lock, known.vm_uuid)
        return self.store.operation(known.id)

    def _replayed(self, kind: Kind, known: Operation) -> Outcome:
        """The answer that this key's operation got the first time."""
        if known.kind is not kind:
            raise RefusedError(f"this key was used for {known.kind} of {known.vm_name}.", "use a new --key")
        if known.state is OpState.OPEN:
            raise BusyError(
                f"operation {known.id} with this key is still open.", "hvctl operation show " + str(known.id)
            )
        if known.state is not OpState.DONE:
            ended = UndoneError if known.state is OpState.UNDONE else NotUndoneError
            raise ended(f"operation {known.id} with this key ended {known.state}: {known.reason}", "use a new --key")
        result = dict(known.result or {})
        warnings = tuple(result.pop("warnings", ()))
        goal, _ = result.pop("goal", f"{known.kind} {known.vm_name}"), result.pop("reasons", ())
        return Outcome(
            known.kind,
            known.vm_uuid,
            known.vm_name,
            known.state,
            goal,
            (),
            ("this key's operation was done before",),
            known.id,
            known.steps,
            warnings,
            result=result,
        )

    @staticmethod
    def _outcome(
        kind: Kind,
        uuid: str,
        name: str,
        state: OpState | None,
        decision: Decision,
        operation: int | None = None,
        run: Execution | None = None,
        seconds: float = 0.0,
    ) -> Outcome:
        return Outcome(
            kind,
            uuid,
            name,
            state,
            decision.plan.goal,
            tuple((step_name(s), step_detail(s)) for s in decision.plan.steps if not isinstance(s, Enter)),
            decision.plan.reasons,
            operation,
            tuple(run.records) if run else (),
            tuple(run.warnings) if run else (),
            seconds,
            decision.result,
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except KeyError:  # in a container a uid may have no name
        return str(os.geteuid())


def _said(outcome: Outcome) -> dict[str, Any]:
    """What of an outcome the journal keeps beside its result."""
    return {"warnings": list(outcome.warnings), "goal": outcome.goal, "reasons": list(outcome.reasons)}


def _promise(uuid: str, name: str, decision: Decision) -> Promise | Forget | None:
    if decision.forget:
        return FORGET
    if decision.goal is None:
        return None
    left = decision.before.left
    counted = resources(decision.goal.allocation) if left is None else left
    return Promise(uuid, name, counted, decision.holds)


def _decided(answer: Decision | Refusal) -> Decision:
    if isinstance(answer, Refusal):
        raise RefusedError(answer.message, answer.hint)
    return answer
