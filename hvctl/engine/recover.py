"""Ends operations whose owner died: observe, ask decide/recovery for the answer, do its steps, close the row.

May itself be killed at any point: every answer can be repeated, and the mark moves only with the phases.
"""

from __future__ import annotations

from dataclasses import replace

from hvctl import codec
from hvctl.decide.recovery import answer
from hvctl.decide.scope import disk_targets
from hvctl.engine.execute import Execution, StepError
from hvctl.engine.handover import pool_move
from hvctl.engine.lock import VmLock
from hvctl.engine.observe import observe
from hvctl.engine.site import Site
from hvctl.errors import NotFoundError, NotUndoneError
from hvctl.model.allocation import resources
from hvctl.model.host import FORGET, Forget, Promise
from hvctl.model.operation import Before, Kind, Operation, OpState, Phase
from hvctl.model.snapshot import Binding
from hvctl.model.vm import State, Vm


def recover_vm(site: Site, lock: VmLock, uuid: str) -> Operation | None:
    """Close the open operation of a VM whose lock is held by us; the closed one, None if there was none.

    DeadlineError or UnreachableError: the VM cannot be seen now, so nothing was touched and the row stays open."""
    opened = site.store.operations(site.facts.name, uuid, OpState.OPEN)
    if not opened:
        lock.clear()
        return None
    operation = opened[0]
    site.progress(f"recovering operation {operation.id}: {operation.kind} of {operation.vm_name}")
    before = codec.load(Before, operation.before)
    now = _now(site, uuid)
    active = now is not None and now.state.active and operation.kind is Kind.RESET
    binding = site.host.machine.binding(now) if active and now else None
    snapshots = tuple(reversed(site.host.machine.snapshots(uuid, hidden=True)))
    phase = _phase(lock, operation, now)
    kept = bool(before.load) and site.host.storage.kept_disks(uuid) == before.load
    saving = before.snapshot if operation.kind is Kind.SNAPSHOT_SAVE else None
    archived = saving is not None and site.host.archives.published(saving, before.archive)
    back = _back(site, operation, before, now, binding)
    end = answer(operation, phase, before, now, binding, snapshots, kept=kept, archived=archived, back=back)
    run = Execution(
        site.host,
        lock,
        site.faults,
        site.settings.memory_margin,
        operation.id,
        operation.kind,
        site.progress,
        vm=now,
        recovering=True,
        phase=phase,
    )
    state, reason = end.state, f"recovered: {end.reason}"
    try:
        run.run(end.steps)
    except StepError as e:
        if e.unknown:
            raise NotUndoneError(
                f"operation {operation.id} cannot be ended now: {e.message}", "hvctl recover tries again"
            ) from e.cause
        state = OpState.QUARANTINED if e.torn else OpState.FAILED
        reason = f"recovery failed: {e.message}"
    succeeded = state is end.state
    promise: Promise | Forget | None = None
    if succeeded and end.forget:
        promise = FORGET
    elif succeeded and end.goal_holds and before.goal:
        counted = resources(before.goal.allocation) if before.left is None else before.left
        promise = Promise(uuid, operation.vm_name, counted, before.holds)
    if run.mended:
        # As where nobody died: the VM is right, and what was wrong must not pass for success.
        state, reason = OpState.FAILED if succeeded else state, f"{reason}; {' '.join(run.mended)}"
    site.faults.point(f"recover-{operation.kind.value}", "close", "before")
    # What is quarantined is the process that was found, which need not be the one that the operation began with.
    process = codec.dump(now.process) if state is OpState.QUARANTINED and now and now.process else None
    site.store.close_operation(
        operation.id,
        state,
        reason=reason,
        result={"process": process} if process else None,
        steps=run.records,
        promise=promise,
        record=before.goal,
        move=pool_move(site, operation.kind, before, state),
    )
    lock.clear()
    return site.store.operation(operation.id)


def _now(site: Site, uuid: str) -> Vm | None:
    try:
        return observe(site.host, uuid, guest=True)
    except NotFoundError:
        return None


def _back(site: Site, operation: Operation, before: Before, now: Vm | None, binding: Binding | None) -> frozenset[str]:
    """The disks of a reset of disks alone that are, or will be, at the snapshot."""
    if operation.kind is not Kind.RESET or now is None or binding is None or before.snapshot is None:
        return frozenset()
    if binding.process != before.snapshot.binding.process:
        return frozenset()
    machine, snapshot = site.host.machine, before.snapshot
    if before.plugs and before.vm is not None:
        with_disks = replace(now, disks=before.vm.disks)
        return frozenset(t for t in before.plugs if machine.disk_is_reverted(with_disks, snapshot, t))
    return frozenset(t for t in disk_targets(now, before.scope) if machine.disk_is_back(now, t))


def _phase(lock: VmLock, operation: Operation, now: Vm | None) -> Phase:
    """How far the dead owner came. Without a mark of this operation (killed before it was written, or the file was
    removed) the careful answer: half done, unless a reset's guest still runs, which it cannot when half done."""
    mark = lock.read()
    if mark is not None and mark.operation == operation.id:
        return mark.phase
    if operation.kind is Kind.RESET and now is not None and now.state is not State.PAUSED:
        return Phase.BEGUN
    return Phase.TOUCHING
