"""Plans for taking a snapshot, returning to it and deleting it. The order is the safety: reasons stand at each plan."""

from __future__ import annotations

from dataclasses import replace

from hvctl.model.allocation import Record
from hvctl.model.operation import Phase
from hvctl.model.plan import (
    AwaitAgent,
    CopyRam,
    DropSnapshot,
    Enter,
    LoadState,
    Pause,
    Plan,
    PrepareSnapshot,
    PublishSnapshot,
    Refusal,
    Reseed,
    RestoreBalloon,
    RestoreRam,
    Resume,
    SaveState,
    SetClock,
    SetRecord,
    Step,
)
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import State, Vm
from hvctl.units import format_size

AGENT_SECONDS = 15.0


def refuse_unready(vm: Vm) -> Refusal | None:
    """Why a VM cannot have warm snapshots now, or None."""
    if vm.state not in (State.RUNNING, State.PAUSED):
        return Refusal(f"{vm.name} is {vm.state}: a snapshot is of a running VM.", f"hvctl vm start {vm.name}")
    if vm.missing:
        return Refusal(
            f"{vm.name} lacks what warm resets need: {', '.join(vm.missing)}.",
            f"`hvctl vm adopt {vm.name}` shows the change; it takes effect at the next start",
        )
    if vm.state is State.PAUSED and vm.reason == "io-error":
        return Refusal(f"{vm.name} is paused by an I/O error.", "free space on the host, then resume it")
    return None


def plan_take(vm: Vm, snapshot: Snapshot, need: int, free: int, taken: tuple[Snapshot, ...]) -> Plan | Refusal:
    """Take a snapshot; need and free are bytes of the tmpfs that snapshots live on."""
    if any(s.name == snapshot.name for s in taken):
        return Refusal(
            f"{vm.name} has a snapshot {snapshot.name} already.", f"hvctl snapshot delete {vm.name} {snapshot.name}"
        )
    if need > free:
        return Refusal(
            f"no space for the snapshot: it needs {format_size(need)}, {format_size(free)} are free.",
            f"`hvctl snapshot list {vm.name}` shows what could go",
        )
    running = vm.state is State.RUNNING
    steps: list[Step] = [Enter(Phase.TOUCHING), PrepareSnapshot(snapshot)]
    steps += [Pause(vm.uuid)] if running else []
    steps += [SaveState(snapshot), CopyRam(snapshot), PublishSnapshot(snapshot), Enter(Phase.COMMITTED)]
    steps += [Resume(vm.uuid)] if running else []
    return Plan(f"snapshot {vm.name} as {snapshot.name}", tuple(steps))


def binding_difference(snapshot: Binding, now: Binding) -> str | None:
    """In words, why a snapshot does not fit the VM as it is now; None when it fits."""
    if snapshot.process != now.process:
        return "its QEMU process is another one than when the snapshot was taken"
    for what, old, new in (("device", snapshot.devices, now.devices), ("disk", snapshot.blocks, now.blocks)):
        gone = sorted(set(old) - set(new))
        come = sorted(set(new) - set(old))
        if gone or come:
            said = [f"{what} {g!r} is gone" for g in gone[:3]] + [f"{what} {c!r} is new" for c in come[:3]]
            return ", ".join(said)
    return None


def after_reset(vm: Vm, snapshot: Snapshot) -> Record:
    """What is promised after a reset: the guest is back at the vCPUs and the balloon of the snapshot."""
    record = vm.record or Record(vm.allocation)
    allocation = replace(record.allocation, vcpus=snapshot.vcpus, memory=snapshot.balloon)
    return record.with_allocation(allocation)


def plan_reset(vm: Vm, snapshot: Snapshot, now: Binding) -> Plan | Refusal:
    """The whole VM back to the snapshot. RAM comes before the state load, because virtio reads its rings out of guest
    RAM while loading, and again after it, because the machine reset inside the load writes ROMs and tables."""
    difference = binding_difference(snapshot.binding, now)
    if difference:
        return Refusal(
            f"{snapshot.name} does not fit {vm.name} any more: {difference}.",
            f"take a new one: hvctl snapshot take {vm.name}",
        )
    resume = not (vm.state is State.PAUSED and vm.reason == "user")
    reasons = () if resume else ("it was paused by the operator and stays paused",)
    steps = reset_steps(vm.uuid, snapshot, after_reset(vm, snapshot), vm.has_agent, resume)
    return Plan(f"reset {vm.name} to {snapshot.name}", steps, reasons)


def reset_steps(uuid: str, snapshot: Snapshot, record: Record, agent: bool, resume: bool) -> tuple[Step, ...]:
    """All of a reset; repeating it from any point leads to the same state, since the snapshot never changes."""
    steps: list[Step] = [
        Pause(uuid),
        Enter(Phase.TOUCHING),
        RestoreRam(snapshot),
        LoadState(snapshot),
        RestoreRam(snapshot, tries=2),
        Enter(Phase.COMMITTED),
    ]
    if not resume:
        return (*steps, SetRecord(uuid, record))
    steps += [Resume(uuid), RestoreBalloon(snapshot), SetRecord(uuid, record)]
    if agent:
        steps += [AwaitAgent(uuid, AGENT_SECONDS), SetClock(uuid), Reseed(uuid)]
    return tuple(steps)


def plan_drop(vm_name: str, snapshot: Snapshot) -> Plan:
    return Plan(f"delete snapshot {snapshot.name} of {vm_name}", (Enter(Phase.TOUCHING), DropSnapshot(snapshot)))
