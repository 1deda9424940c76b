"""Engine: the one door through which a VM is changed. A verb says what it wants as a decision from facts to a plan;
the engine does it under lock, row and mark, and answers how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hvctl import codec
from hvctl.engine.endings import failed, left_open, replayed
from hvctl.engine.execute import Execution, StepError
from hvctl.engine.handover import admission, pool_move
from hvctl.engine.learned import learned
from hvctl.engine.lock import VmLock, vm_lock
from hvctl.engine.observe import observe
from hvctl.engine.quarantine import refuse_quarantined
from hvctl.engine.recover import recover_vm
from hvctl.engine.site import Site
from hvctl.errors import BusyError, HvctlError, Interrupted, RefusedError
from hvctl.model.allocation import Record, Resources, resources
from hvctl.model.host import FORGET, Forget, Promise
from hvctl.model.operation import Before, Kind, Operation, OpState, Outcome, Phase
from hvctl.model.plan import Enter, Plan, Refusal
from hvctl.model.stepwords import step_detail, step_name
from hvctl.model.vm import Vm


@dataclass(frozen=True, slots=True)
class Decision:
    """What a verb decided: the plan, and what the ledger says after it.

    goal: what is promised afterwards (None: as before). holds: whether the VM then counts against the host.
    forget: the VM is gone afterwards. warnings: what its operator should know of it beside that."""

    plan: Plan
    before: Before
    goal: Record | None = None
    holds: bool = False
    forget: bool = False
    result: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def wanted(self) -> Resources | None:
        """What must be free on the host before the first step; None asks for nothing."""
        if not self.goal or not self.holds:
            return None
        return resources(self.goal.allocation) if self.before.left is None else self.before.left


Decide = Callable[[Vm | None], Decision | Refusal]


class Engine(Site):
    """Changes VMs, one operation at a time."""

    def preview(self, kind: Kind, ref: str | None, name: str, decide: Decide) -> Outcome:
        """What change() would do now: the same decision and the same admission, no effect."""
        with self.released():
            vm = self._observed(ref) if ref else None
            decision = self._decision(kind, vm, decide)
        check = admission(self, vm, decision.wanted, vm.uuid if vm else "", vm.name if vm else name)
        if check:
            check(self.store.ledger(self.facts.name))
        return self._outcome(kind, vm.uuid if vm else "", name if vm is None else vm.name, None, decision)

    def change(
        self, kind: Kind, ref: str, request: dict[str, Any], decide: Decide, *, key: str | None = None, new: str = ""
    ) -> Outcome:
        """Run one operation on the VM `ref` (of a VM to create: its uuid, and its name in `new`)."""
        asked = new or ref
        if answer := self.answered(kind, asked, request, key):
            return answer
        self.sweep()
        began = time.monotonic()
        uuid = ref if new else self.host.domains.uuid(ref)
        with self.released(), vm_lock(self.settings.locks_dir, uuid, self.settings.lock_wait) as lock:
            recover_vm(self, lock, uuid)
            if answer := self.answered(kind, asked, request, key):
                return answer
            vm = None if new else self._observed(uuid)
            name = vm.name if vm else new
            try:
                decision = self._decision(kind, vm, decide)
            except RefusedError:
                # The same request, a moment ahead of this one, may be what stands in its way.
                if answer := self.answered(kind, asked, request, key):
                    return answer
                raise
            if not decision.plan.steps:
                return self._outcome(kind, uuid, name, OpState.DONE, decision)
            try:
                return self._run(lock, kind, uuid, name, request, decision, key, began)
            except KeyboardInterrupt as e:
                if left := next((o for o in self.store.open_operations(self.facts.name) if o.vm_uuid == uuid), None):
                    raise Interrupted(left_open(left)) from e
                raise

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
            admit=admission(self, decision.before.vm, decision.wanted, uuid, name),
            held=decision.wanted,
        )
        if key and (operation.state is not OpState.OPEN or operation.vm_uuid != uuid):
            return replayed(kind, self._known(key) or operation, name, request)
        self.faults.point(kind.value, "row", "after")
        lock.mark(operation.id, Phase.BEGUN)
        self.faults.point(kind.value, "begun", "after")
        margin = self.settings.memory_margin
        run = Execution(self.host, lock, self.faults, margin, operation.id, kind, self.progress, vm=decision.before.vm)
        try:
            run.run(decision.plan)
        except StepError as e:
            failed(self, lock, operation, run, e)
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

    def sweep(self) -> list[Operation]:
        """Recover every operation whose owner is dead; those that cannot be observed now stay open."""
        ended = []
        for operation in self.store.open_operations(self.facts.name):
            try:
                with self.released(), vm_lock(self.settings.locks_dir, operation.vm_uuid, 0) as lock:
                    closed = recover_vm(self, lock, operation.vm_uuid)
            except BusyError:
                continue
            except HvctlError as e:
                self.progress(f"operation {operation.id} stays open: {e.message}")
                continue
            if closed:
                ended.append(closed)
        return ended

    def _observed(self, ref: str) -> Vm:
        """The VM as it is; what the domain's metadata lost of the promise, the database still knows."""
        vm = observe(self.host, ref, guest=True)
        if vm.record is not None:
            return vm
        return replace(vm, record=self.store.record_of(self.facts.name, vm.uuid))

    def _decision(self, kind: Kind, vm: Vm | None, decide: Decide) -> Decision:
        """That a guest may not go on is said before whatever else is in the way of it."""
        try:
            decision = _decided(decide(vm))
        except RefusedError:
            refuse_quarantined(self, kind, vm)
            raise
        if decision.plan.steps:
            refuse_quarantined(self, kind, vm)
        return decision

    def answered(self, kind: Kind, ref: str, request: dict[str, Any], key: str | None) -> Outcome | None:
        """What this request with this key was answered before; ref is the VM as it was asked for."""
        known = self._known(key)
        return None if known is None else replayed(kind, known, ref, request)

    def _known(self, key: str | None) -> Operation | None:
        """The operation of this key once it has ended: its owner is waited for, or, when it is dead, recovered."""
        known = self.store.operation_of_key(self.facts.name, key) if key else None
        if known is None or known.state is not OpState.OPEN:
            return known
        with vm_lock(self.settings.locks_dir, known.vm_uuid, self.settings.lock_wait) as lock:
            recover_vm(self, lock, known.vm_uuid)
        return self.store.operation(known.id)

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
            (*decision.warnings, *(run.warnings if run else ())),
            seconds,
            decision.result,
        )


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
