"""What becomes of an operation whose owner died: for each kind one answer per phase, from what is observed now.

The row says what was asked and what was before; the lock file's line says how far it came. Every answer may be
repeated, since recovery itself may be killed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from hvctl.decide.allocate import plan_allocation, with_parts
from hvctl.decide.answer import Answer
from hvctl.decide.archiverecovery import load_answer, save_answer
from hvctl.decide.away import interrupt_answer, resume_answer
from hvctl.decide.reset import binding_difference, go_on, partial_load, reset_steps
from hvctl.decide.scope import disk_targets
from hvctl.model.disksteps import FinishDisk, PlugDisk
from hvctl.model.operation import Before, Kind, Operation, OpState, Phase
from hvctl.model.plan import (
    ClearNics,
    Destroy,
    DropSnapshot,
    Pause,
    Redefine,
    Refusal,
    RemoveFiles,
    Resume,
    SetMemory,
    SetNicLimit,
    SetRecord,
    Step,
    Undefine,
)
from hvctl.model.reset import Hooks
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import State, Vm


def answer(
    operation: Operation,
    phase: Phase,
    before: Before,
    now: Vm | None,
    binding: Binding | None,
    snapshots: tuple[Snapshot, ...],
    *,
    kept: bool = False,
    archived: bool = False,
    back: frozenset[str] = frozenset(),
) -> Answer:
    """now is None when the VM was surely absent; binding is that of the running QEMU, None when there is none;
    snapshots are those of the VM that have their manifest. kept: the disks from before a load are kept; archived: what
    was to be saved is there, whole; back: the disks (vda…) that a reset of disks alone leaves at the snapshot."""
    uuid = operation.vm_uuid
    match operation.kind:
        case Kind.CREATE:
            return _create(uuid, phase)
        case Kind.DELETE:
            return _delete(uuid, phase, now, snapshots)
        case Kind.START:
            return _start(now)
        case Kind.STOP:
            return _stop(uuid, now, snapshots)
        case Kind.ALLOCATE:
            return _allocate(phase, before, now)
        case Kind.ADOPT:
            if before.xml is None or now is None:
                return Answer(OpState.UNDONE, reason="nothing was changed")
            folder: tuple[Step, ...] = (RemoveFiles(uuid),) if before.vm and before.vm.monitor is None else ()
            return Answer(OpState.UNDONE, (Redefine(uuid, before.xml), *folder), "the definition is as before")
        case Kind.PROTECT | Kind.SET:
            done = now is not None and now.record == before.goal
            return Answer(OpState.DONE if done else OpState.UNDONE, goal_holds=done, reason="as observed")
        case Kind.SNAPSHOT_TAKE:
            return _take(uuid, before, now, snapshots)
        case Kind.SNAPSHOT_DELETE:
            steps = (DropSnapshot(before.snapshot),) if before.snapshot else ()
            return Answer(OpState.DONE, steps, "deletion finished")
        case Kind.SNAPSHOT_SAVE:
            return save_answer(before, archived)
        case Kind.SNAPSHOT_LOAD:
            return load_answer(uuid, phase, before, now, snapshots, kept)
        case Kind.INTERRUPT:
            return interrupt_answer(uuid, phase, before, now, snapshots)
        case Kind.RESUME:
            return resume_answer(before, now)
        case Kind.RESET:
            return _reset(uuid, phase, before, now, binding, back)
        case _:
            assert_never(operation.kind)


def _create(uuid: str, phase: Phase) -> Answer:
    if phase is Phase.COMMITTED:
        return Answer(OpState.DONE, reason="the VM was made", goal_holds=True)
    steps: tuple[Step, ...] = (Destroy(uuid), ClearNics(uuid), Undefine(uuid), RemoveFiles(uuid))
    return Answer(OpState.UNDONE, steps, "half-made VM removed", forget=True)


def _delete(uuid: str, phase: Phase, now: Vm | None, snapshots: tuple[Snapshot, ...]) -> Answer:
    if phase is Phase.BEGUN:
        return Answer(OpState.UNDONE, reason="nothing was deleted yet")
    if now is not None and now.protected:
        return Answer(OpState.QUARANTINED, reason="half deleted, and protected since: nothing more was removed")
    drops = [DropSnapshot(s) for s in snapshots]
    steps: tuple[Step, ...] = (Destroy(uuid), ClearNics(uuid), *drops, Undefine(uuid), RemoveFiles(uuid))
    return Answer(OpState.DONE, steps, "deletion finished", forget=True)


def _start(now: Vm | None) -> Answer:
    if now is None or not now.state.active:
        return Answer(OpState.UNDONE, reason="the VM was not started")
    wanted = now.record.allocation.nics if now.record else ()
    taps = {n.mac for n in now.nics if n.tap}
    steps = tuple(SetNicLimit(now.uuid, n) for n in wanted if n.mac in taps and n != now.allocation.nic(n.mac))
    return Answer(OpState.DONE, steps, "the VM runs; its bandwidth is as promised", goal_holds=True)


def _stop(uuid: str, now: Vm | None, snapshots: tuple[Snapshot, ...]) -> Answer:
    if now is None or not now.state.active:
        drops = [DropSnapshot(s) for s in snapshots]
        return Answer(OpState.DONE, (ClearNics(uuid), *drops), "the VM is off", goal_holds=True)
    return Answer(OpState.UNDONE, reason="the VM still runs")


def _allocate(phase: Phase, before: Before, now: Vm | None) -> Answer:
    """All new, or all old: decided by what is observed, not by how far the dead owner thought it was."""
    if phase is Phase.BEGUN:
        return Answer(OpState.UNDONE, reason="nothing was changed")
    if now is None or before.vm is None:
        return Answer(OpState.FAILED, reason="the VM is gone")
    wanted = before.wanted or before.vm.allocation
    if now.record == before.goal and with_parts(now.allocation, wanted, before.vm.allocation) == now.allocation:
        return Answer(OpState.DONE, reason="all of it was in place", goal_holds=True)
    old = before.vm
    if now.state is State.OFF and old.state is not State.OFF:
        # A guest that went off took its live limits with it; what starts it again is the definition.
        now = replace(now, allocation=replace(now.allocation, nics=old.allocation.nics))
    back = with_parts(now.allocation, old.allocation, wanted)
    plan = plan_allocation(now, back, old.record, None, margin=0, force=True)
    if isinstance(plan, Refusal):
        return Answer(OpState.FAILED, reason=plan.message)
    steps = tuple(replace(s, best_effort=True) if isinstance(s, SetMemory) else s for s in plan.effects)
    if old.record is None and now.record is not None:
        steps += (SetRecord(now.uuid, None),)
    return Answer(OpState.UNDONE, steps, "everything is as before")


def _take(uuid: str, before: Before, now: Vm | None, snapshots: tuple[Snapshot, ...]) -> Answer:
    resume = _resume(uuid, before, now)
    if before.snapshot and any(s.id == before.snapshot.id for s in snapshots):
        return Answer(OpState.DONE, resume, "the snapshot was complete")
    drop: tuple[Step, ...] = (DropSnapshot(before.snapshot),) if before.snapshot else ()
    return Answer(OpState.UNDONE, drop + resume, "the partial snapshot was removed")


def _resume(uuid: str, before: Before, now: Vm | None) -> tuple[Step, ...]:
    paused = now is not None and now.state is State.PAUSED
    return (Resume(uuid),) if paused and before.was_running else ()


def _greeted(uuid: str, before: Before, now: Vm) -> tuple[Step, ...]:
    """A guest that is wholly back repeats its random numbers, and has the time of the snapshot."""
    resume = _resume(uuid, before, now)
    if not resume or not (before.scope.ram and before.scope.devices):
        return resume
    return (Resume(uuid, greet=before.wishes.reseed, clock=before.wishes.clock),)


def _reset(
    uuid: str, phase: Phase, before: Before, now: Vm | None, binding: Binding | None, back: frozenset[str]
) -> Answer:
    drop: tuple[Step, ...] = (DropSnapshot(before.scratch),) if before.scratch else ()
    if now is None or not now.state.active or binding is None:
        return Answer(OpState.FAILED, drop, "the QEMU process died during the reset")
    given = _given_again(uuid, before)
    if before.snapshot is None:
        shaped = tuple(SetNicLimit(uuid, now.allocation.nic(n.mac)) for n in now.nics if n.tap and before.scope.net)
        return Answer(OpState.UNDONE, (*given, *shaped), "memory and bandwidth are as before")
    if phase is Phase.BEGUN and not before.plugs:
        return Answer(OpState.UNDONE, (*_resume(uuid, before, now), *drop), "nothing was written")
    if binding.process != before.snapshot.binding.process:
        reason = "the VM runs in another QEMU process since: its memory is that of a boot"
        return Answer(OpState.FAILED, drop, reason)
    promise: tuple[Step, ...] = (SetRecord(uuid, before.goal),) if before.goal else ()
    if phase is Phase.COMMITTED:
        # The guest may have worked since it was resumed: finishing must not take that work away.
        steps = (*_greeted(uuid, before, now), *given, *promise, *drop)
        return Answer(OpState.DONE, steps, "the reset was complete", goal_holds=True)
    if before.plugs:
        return _replugged(uuid, before, before.snapshot, now, back if phase is Phase.TOUCHING else frozenset())
    # With the tracker that works: the one that was asked for may be what failed.
    scope, wishes = before.scope, replace(before.wishes, hooks=Hooks(), tracker=TrackerKind.AUTO)
    machine = scope.ram or scope.devices or bool(scope.ranges)
    if machine and now.state is not State.PAUSED:
        return Answer(
            OpState.QUARANTINED,
            reason="somebody resumed the guest in the middle of a reset: its memory may be mixed",
        )
    difference = binding_difference(before.snapshot.binding, binding) if machine else None
    if difference:
        return Answer(OpState.QUARANTINED, reason=f"the reset cannot be repeated: {difference}")
    if scope.ram and scope.devices and before.goal is not None:
        steps = reset_steps(
            replace(now, has_agent=False), before.snapshot, scope, wishes, before.goal, before.was_running
        )
    elif before.scratch is not None:
        again = partial_load(before.snapshot, before.scratch, scope, wishes)
        steps = (Pause(uuid), *again, *(go_on(now, wishes) if before.was_running else ()), *drop)
    else:
        return _disks(uuid, before, now, back)
    return Answer(OpState.DONE, steps, "the reset was repeated", goal_holds=True)


def _disks(uuid: str, before: Before, now: Vm, back: frozenset[str]) -> Answer:
    """What was begun is ended, and nothing is begun: the guest ran since, and may use a disk that it had released."""
    targets = disk_targets(now, before.scope)
    steps = (*(FinishDisk(uuid, t) for t in targets), *_resume(uuid, before, now))
    return _ended(steps, targets, back)


def _replugged(uuid: str, before: Before, snapshot: Snapshot, now: Vm, back: frozenset[str]) -> Answer:
    """Whatever its image is by now, the guest gets each disk again; one that it still has it keeps."""
    plugs = (PlugDisk(snapshot, target, xml) for target, xml in before.plugs.items())
    return _ended((*_resume(uuid, before, now), *plugs), tuple(before.plugs), back)


def _ended(steps: tuple[Step, ...], targets: tuple[str, ...], back: frozenset[str]) -> Answer:
    if back >= set(targets):
        return Answer(OpState.DONE, steps, "the disks are back", goal_holds=True)
    if not back:
        return Answer(OpState.UNDONE, steps, "no disk had gone back")
    left = sorted(set(targets) - back)
    return Answer(OpState.FAILED, steps, f"{', '.join(sorted(back))} went back, {', '.join(left)} did not")


def _given_again(uuid: str, before: Before) -> tuple[Step, ...]:
    """Who is killed while a page cache is taken back leaves the guest squeezed."""
    record = before.goal.allocation if before.goal else before.vm.allocation if before.vm else None
    if not before.scope.cache or record is None:
        return ()
    return (SetMemory(uuid, record.memory, force=True, best_effort=True),)
