"""What becomes of a save and of a load whose owner died."""

from __future__ import annotations

from dataclasses import replace

from hvctl.decide.allocate import plan_allocation
from hvctl.decide.answer import Answer
from hvctl.decide.archive import starts_with
from hvctl.decide.reset import going_on
from hvctl.model.allocation import Record
from hvctl.model.archivesteps import DropArchive, ReleaseDisks, RemoveImport, ReturnDisks
from hvctl.model.operation import Before, OpState, Phase
from hvctl.model.plan import (
    ClearNics,
    Destroy,
    DropSnapshot,
    Enter,
    Refusal,
    SetMemory,
    SetNicLimit,
    SetRecord,
    Step,
)
from hvctl.model.reset import Wishes
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm


def save_answer(before: Before, archived: bool) -> Answer:
    """A folder that has its name is whole; everything else goes."""
    drop: tuple[Step, ...] = (DropArchive(before.snapshot, before.archive),) if before.snapshot else ()
    if archived:
        return Answer(OpState.DONE, drop, "the snapshot was saved")
    return Answer(OpState.UNDONE, drop, "what was saved of it was removed")


def load_answer(
    uuid: str, phase: Phase, before: Before, now: Vm | None, snapshots: tuple[Snapshot, ...], kept: bool
) -> Answer:
    """Whether the old disks are kept tells how far it came, also where the mark is lost (a restart of the host takes it
    away): as long as they are, the guest has not run with the new ones by hvctl's hand, and all can be taken back."""
    snapshot = before.snapshot
    if snapshot is None or before.vm is None:
        return Answer(OpState.UNDONE, reason="nothing was touched")
    active = now is not None and now.state.active
    overlays = tuple(str(d.path) for d in before.vm.disks if d.writable)
    release = ReleaseDisks(uuid, before.load, overlays)
    process = now.process if now else None
    loaded = any(s.id == snapshot.id and s.binding.process == process for s in snapshots)
    if now is not None and active and (phase is Phase.COMMITTED if kept else loaded):
        # The guest may have worked since: finishing must not take that away.
        steps = (release, *_finished(now, before, snapshot))
        return Answer(OpState.DONE, steps, "the load was complete", goal_holds=True)
    if now is not None and active and kept and now.state is not State.PAUSED:
        return Answer(
            OpState.QUARANTINED,
            reason="somebody started or resumed the guest in the middle of a load: its memory may be mixed."
            f" Its disks from before lie beside these, and end in .{before.load}.old",
        )
    if not kept and phase is Phase.COMMITTED:
        steps = (release, DropSnapshot(snapshot))
        return Answer(OpState.FAILED, steps, "the QEMU process died after the load; the disks are the loaded ones")
    # A VM that is active without the old disks being kept was started by somebody else, before any was replaced.
    end: tuple[Step, ...] = (Destroy(uuid), ClearNics(uuid)) if kept else ()
    # One of the process that it was saved in: the load had not come to dropping it.
    stale = any(s.id == snapshot.id and s.binding.process == snapshot.binding.process for s in snapshots)
    remove = () if stale else (RemoveImport(snapshot),)
    defined = _defined_before(before, snapshot) if now is not None and (kept or not active) else ()
    steps = (Enter(Phase.TOUCHING), *end, ReturnDisks(uuid, before.load, overlays), *remove, *defined)
    return Answer(OpState.UNDONE, steps, "the VM has the disks that it had")


def _finished(now: Vm, before: Before, snapshot: Snapshot) -> tuple[Step, ...]:
    uuid, record = now.uuid, before.goal or Record(now.allocation)
    taps = {n.mac for n in now.nics if n.tap}
    wanted = record.allocation.nics
    limits = (SetNicLimit(uuid, n) for n in wanted if n.mac in taps and n != now.allocation.nic(n.mac))
    # A guest that has not run yet is to learn the time, and not to repeat its random numbers.
    paused = now.state is State.PAUSED
    return (*limits, *(going_on(now, snapshot, Wishes(), record) if paused else (SetRecord(uuid, record),)))


def _defined_before(before: Before, snapshot: Snapshot) -> tuple[Step, ...]:
    """The definition as it was: the load had changed it to what the snapshot needs."""
    old = before.vm
    if old is None or before.goal is None:
        return ()
    during = replace(old, allocation=starts_with(snapshot, before.goal))
    plan = plan_allocation(during, old.allocation, None, None, margin=0)
    if isinstance(plan, Refusal):
        return ()
    return tuple(replace(s, force=True) if isinstance(s, SetMemory) else s for s in plan.effects)
