"""Plans for saving a snapshot on a disk and loading it into a new QEMU process, and what must be as it was for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hvctl.decide.allocate import plan_allocation
from hvctl.decide.reset import going_on
from hvctl.model.allocation import Allocation, Record
from hvctl.model.archive import Archive, Backing, Hardware, Placement, Room
from hvctl.model.archivesteps import (
    BindSnapshot,
    ImportSnapshot,
    PlaceDisks,
    PublishArchive,
    ReleaseDisks,
    WriteArchive,
)
from hvctl.model.operation import Phase
from hvctl.model.plan import (
    Audit,
    DropSnapshot,
    Enter,
    LoadState,
    Plan,
    Refusal,
    RestoreRam,
    SetNicLimit,
    Start,
    Step,
)
from hvctl.model.reset import Wishes
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm
from hvctl.units import format_size


def plan_save(vm: Vm, snapshot: Snapshot, hardware: Hardware, folder: str, room: Room) -> Plan | Refusal:
    """The guest runs meanwhile: nothing that is read ever changes while the snapshot is there."""
    short = no_room((room,), "save it")
    if short:
        return short
    steps = (
        Enter(Phase.TOUCHING),
        WriteArchive(vm.name, snapshot, hardware, folder),
        PublishArchive(snapshot, folder),
        Enter(Phase.COMMITTED),
    )
    return Plan(f"save snapshot {snapshot.name} of {vm.name} in {folder}", steps)


def no_room(rooms: Iterable[Room], what: str) -> Refusal | None:
    for room in rooms:
        if room.need > room.free:
            return Refusal(
                f"no room to {what}: it may take {format_size(room.need)} of {room.where},"
                f" and {format_size(max(0, room.free))} are free.",
                "make room, or use another place",
            )
    return None


def refuse_load(vm: Vm, archive: Archive, defined: Hardware, backings: dict[str, Backing | None]) -> Refusal | None:
    """Why an archive cannot be loaded into a VM, as far as its definition (`defined`: what libvirt would start) and its
    files tell. backings are the images below the overlays now."""
    if vm.uuid != archive.snapshot.vm_uuid:
        return Refusal(
            f"the saved snapshot is of another VM, {archive.vm_name} ({archive.snapshot.vm_uuid}).", "hvctl vm list"
        )
    if vm.state is not State.OFF:
        return Refusal(
            f"{vm.name} is {vm.state}: a saved snapshot is loaded into a VM that is off.", f"hvctl vm stop {vm.name}"
        )
    if vm.missing:
        return Refusal(f"{vm.name} lacks what warm resets need: {', '.join(vm.missing)}.", f"hvctl vm adopt {vm.name}")
    difference = (
        hardware_difference(archive.hardware, defined)
        or _memory_difference(vm, archive)
        or _disk_difference(vm, archive, backings)
    )
    if difference:
        return Refusal(
            f"the saved snapshot {archive.snapshot.name} does not fit {vm.name} any more: {difference}.",
            f"hvctl vm start {vm.name} boots it from its disks",
        )
    return None


def hardware_difference(saved: Hardware, now: Hardware) -> str | None:
    """In words, what differs; None where both are the same. What one of them does not tell does not differ.

    Bug-fix releases of one version of QEMU (7.2.5, 7.2.22) load each other's states; what their CPUs offer is compared
    by itself."""
    old, new = (h.qemu.split(".")[:2] for h in (saved, now))
    if old != new and now.qemu != "unknown":
        return f"it was saved by QEMU {saved.qemu}, and this host has {now.qemu}"
    if saved.accel != now.accel:
        return f"it was saved under {saved.accel}, and the VM runs under {now.accel}"
    if saved.machine != now.machine:
        return f"its machine was {saved.machine}, and is {now.machine}"
    # What libvirt takes for host-model stands only in a running VM.
    if saved.cpu != now.cpu and now.cpu != "host-model":
        return f"its CPU model was {saved.cpu}, and is {now.cpu}"
    if saved.features and now.features and saved.features != now.features:
        return "its CPU offered other features than this host's does"
    gone, come = (sorted(set(a.devices) - set(b.devices)) for a, b in ((saved, now), (now, saved)))
    words = [f"device {g!r} is gone" for g in gone[:3]] + [f"device {c!r} is new" for c in come[:3]]
    return ", ".join(words) or None


def _memory_difference(vm: Vm, archive: Archive) -> str | None:
    size = archive.snapshot.ram_size
    if size == vm.max_memory:
        return None
    return f"it had {format_size(size)} of memory at most, and has {format_size(vm.max_memory)}"


def _disk_difference(vm: Vm, archive: Archive, backings: dict[str, Backing | None]) -> str | None:
    now = {d.target: d.path for d in vm.disks if d.writable}
    saved = {d.target: d.overlay for d in archive.disks}
    for target in sorted(now.keys() | saved.keys()):
        if now.get(target) != saved.get(target):
            return f"disk {target} was {saved.get(target, 'not there')}, and is {now.get(target, 'not there')}"
    for disk in archive.disks:
        backing = backings.get(disk.overlay)
        if backing != disk.backing:
            old, new = (b.path if b else "none" for b in (disk.backing, backing))
            how = f"was {old}, and is {new}" if old != new else f"({old}) was changed since"
            return f"the image below disk {disk.target} {how}"
    return None


def plugged_vcpus(snapshot: Snapshot) -> int:
    """How many vCPUs its QEMU had, whether the guest used them or not."""
    found = sum(word.startswith("vcpu ") for word in snapshot.binding.devices)
    return found or snapshot.vcpus


def starts_with(snapshot: Snapshot, record: Record) -> Allocation:
    """What the definition has to say so that the new process has the snapshot's devices."""
    return replace(record.allocation, vcpus=plugged_vcpus(snapshot))


def plan_load(
    vm: Vm, archive: Archive, snapshot: Snapshot, record: Record, folder: str, load: str,
    stale: Sequence[Snapshot], rooms: Sequence[Room],
) -> Plan | Refusal:  # fmt: skip
    """snapshot is the archive's as it will be in the new process, record what is promised then.

    The guest does not run before the overlays from before are released: until then all of it can be taken back."""
    short = no_room(rooms, "load it")
    if short:
        return short
    config = plan_allocation(vm, starts_with(snapshot, record), None, None, margin=0)
    if isinstance(config, Refusal):
        return config
    disks = tuple(Placement(f"{folder}/{d.file}", d.overlay) for d in archive.disks)
    limits = tuple(SetNicLimit(vm.uuid, n) for n in record.allocation.nics if n.inbound or n.outbound)
    steps: tuple[Step, ...] = (
        Enter(Phase.TOUCHING),
        *(DropSnapshot(s) for s in stale),
        *config.effects,
        ImportSnapshot(snapshot, folder),
        PlaceDisks(vm.uuid, load, disks),
        Start(vm.uuid, paused=True),
        *limits,
        BindSnapshot(snapshot, archive.hardware),
        RestoreRam(snapshot),
        LoadState(snapshot),
        RestoreRam(snapshot, tries=2),
        Audit(snapshot, snapshot),
        Enter(Phase.COMMITTED),
        ReleaseDisks(vm.uuid, load, archive.overlays),
        *going_on(vm, snapshot, Wishes(), record),
    )
    reasons = ("cold: in a new QEMU process", f"the disks go back to {snapshot.created_at}")
    return Plan(f"load {snapshot.name} into {vm.name} from {folder}", steps, reasons)
