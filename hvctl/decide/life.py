"""Plans for the life of a VM: create, start, stop, delete, protect, adopt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hvctl.decide.allocate import plan_allocation
from hvctl.model.allocation import Record
from hvctl.model.guard import Watch
from hvctl.model.operation import Phase
from hvctl.model.plan import (
    ClearNics,
    Define,
    Destroy,
    DropSnapshot,
    Enter,
    MakeDisks,
    MakeMonitorFolder,
    Plan,
    Redefine,
    Refusal,
    RemoveFiles,
    SetNicLimit,
    SetRecord,
    Shutdown,
    Start,
    Step,
    Undefine,
)
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm, VmSpec


def plan_create(spec: VmSpec, start: bool, lacking: Sequence[str] = ()) -> Plan | Refusal:
    """lacking: bridges of its NICs that the host has not."""
    if start and lacking:
        return Refusal(
            f"{spec.name} cannot start: the host has no bridge {', '.join(lacking)}.",
            "see those it has: ip -br link show type bridge; or leave --start out, and make it first",
        )
    steps: list[Step] = [Enter(Phase.TOUCHING), MakeDisks(spec), Define(spec)]
    if start:
        steps.append(Start(spec.uuid))
    return Plan(f"create {spec.name}", tuple(steps), (f"{spec.accel.value}, image {spec.image}",))


def _stale(snapshots: Sequence[Snapshot]) -> list[Step]:
    return [DropSnapshot(s) for s in snapshots]


def plan_start(vm: Vm, snapshots: Sequence[Snapshot]) -> Plan | Refusal:
    """What was promised into the definition, start, then what libvirt does not keep: bandwidth. Snapshots of an
    earlier process fit no more."""
    if vm.state.active:
        if vm.state is State.RUNNING:
            return Plan(f"start {vm.name}", (), ("it runs already",))
        return Refusal(f"{vm.name} is {vm.state} ({vm.reason}).", f"`virsh resume {vm.name}` continues a paused VM")
    promised = vm.record.allocation if vm.record else vm.allocation
    config = plan_allocation(vm, promised, None, None, margin=0)
    if isinstance(config, Refusal):
        return config
    steps: list[Step] = [Enter(Phase.TOUCHING), *_stale(snapshots), *config.effects, Start(vm.uuid)]
    steps += [SetNicLimit(vm.uuid, limit) for limit in promised.nics if limit.inbound or limit.outbound]
    return Plan(f"start {vm.name}", tuple(steps))


def plan_stop(vm: Vm, snapshots: Sequence[Snapshot], *, force: bool, seconds: float) -> Plan | Refusal:
    """Ask the guest, or end its process with force; what belongs to the process goes with it."""
    if not vm.state.active:
        return Plan(f"stop {vm.name}", (), ("it is off already",))
    if vm.state is not State.RUNNING and not force:
        return Refusal(
            f"{vm.name} is {vm.state} ({vm.reason}): its guest cannot power off.", f"hvctl vm stop {vm.name} --force"
        )
    end: Step = Destroy(vm.uuid) if force else Shutdown(vm.uuid, seconds)
    reasons = (f"drops {len(snapshots)} snapshots: they live in the QEMU process",) if snapshots else ()
    return Plan(f"stop {vm.name}", (Enter(Phase.TOUCHING), end, ClearNics(vm.uuid), *_stale(snapshots)), reasons)


def plan_delete(vm: Vm, snapshots: Sequence[Snapshot], force: bool) -> Plan | Refusal:
    """Remove a VM that hvctl made, with its disks; force ends it if it runs."""
    if vm.protected:
        return protected(vm, "delete")
    if vm.record is None or vm.record.image is None:
        return Refusal(f"hvctl did not create {vm.name}, so it does not delete it.", f"virsh undefine {vm.name}")
    if vm.state.active and not force:
        return Refusal(f"{vm.name} is {vm.state}.", f"stop it first, or hvctl vm delete {vm.name} --force")
    return Plan(
        f"delete {vm.name}",
        (
            Enter(Phase.TOUCHING),
            Destroy(vm.uuid),
            ClearNics(vm.uuid),
            *_stale(snapshots),
            Undefine(vm.uuid),
            RemoveFiles(vm.uuid),
        ),
    )


def plan_protect(vm: Vm, on: bool) -> Plan:
    record = vm.record or Record(vm.allocation)
    if record.protected is on and vm.record is not None:
        return Plan(f"protect {vm.name}", (), (f"it is {'protected' if on else 'not protected'} already",))
    now = "protected from now on" if on else "not protected any more"
    return Plan(f"protect {vm.name}", (SetRecord(vm.uuid, replace(record, protected=on)),), (now,))


def plan_set(vm: Vm, priority: int | None, interruptible: bool | None) -> Plan | Refusal:
    record = vm.record or Record(vm.allocation)
    if priority is not None and not 0 <= priority <= 1000:
        return Refusal(f"a priority of {priority} is outside 0 to 1000.", "500 is the default")
    if interruptible and record.protected:
        return Refusal(f"{vm.name} is protected: nobody may interrupt it.", f"hvctl vm protect {vm.name} --off")
    new = replace(
        record,
        priority=record.priority if priority is None else priority,
        interruptible=record.interruptible if interruptible is None else interruptible,
    )
    if new == vm.record:
        return Plan(f"set {vm.name}", (), ("it is as asked already",))
    changes = []
    if new.priority != record.priority:
        changes.append(f"priority {record.priority} -> {new.priority}")
    if new.interruptible is not record.interruptible:
        changes.append("interruptible" if new.interruptible else "not interruptible")
    return Plan(f"set {vm.name}", (SetRecord(vm.uuid, new),), tuple(changes))


def plan_guard(vm: Vm, watch: Watch | None, stored: Watch | None) -> tuple[Plan, Record]:
    """Arm a guard or, with None, disarm it; the VM's record then. stored: what the database has of it."""
    new = replace(vm.record or Record(vm.allocation), guard=watch)
    if new == vm.record and stored == watch:
        return Plan(f"guard {vm.name}", (), ("it is as asked already",)), new
    goal = f"guard {vm.name} by {watch.name}" if watch else f"guard {vm.name} no more"
    return Plan(goal, (SetRecord(vm.uuid, new),)), new


def plan_adopt(vm: Vm, xml: str, adopted: str) -> Plan | Refusal:
    """Only the persistent definition changes; it takes effect at the next start of the VM."""
    if not vm.persistent:
        return Refusal(f"{vm.name} is transient: it has no definition to change.", "`virsh define` it first")
    if adopted == xml and vm.record is not None:
        return Plan(f"adopt {vm.name}", (), ("it has what warm resets need already",))
    steps: list[Step] = [MakeMonitorFolder(vm.uuid), Redefine(vm.uuid, adopted)] if adopted != xml else []
    if vm.record is None:
        steps.append(SetRecord(vm.uuid, Record(vm.allocation)))
    return Plan(f"adopt {vm.name}", tuple(steps), ("takes effect when the VM is started the next time",))


def protected(vm: Vm, verb: str) -> Refusal:
    return Refusal(f"{vm.name} is protected, so hvctl does not {verb} it.", f"hvctl vm protect {vm.name} --off")
