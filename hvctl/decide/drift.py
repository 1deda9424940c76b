"""Where what is and what was promised have come apart, and which mending each case has. Reports first; nothing here
ever ends or removes a VM, and what belongs to a VM that is merely not listed is left alone unless it stays away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from shlex import quote

from hvctl.model.allocation import Allocation, Record
from hvctl.model.operation import Operation
from hvctl.model.snapshot import Snapshot, StrayTag
from hvctl.model.vm import State, Vm
from hvctl.units import format_rate, format_size


class Mend(StrEnum):
    """What --fix does about a drift; NOTHING is for a person."""

    NOTHING = "nothing"
    REALLOCATE = "reallocate"
    RECORD = "record"
    FORGET = "forget"
    DROP_SNAPSHOTS = "drop-snapshots"
    DROP_TAGS = "drop-tags"
    CLEAR_DEVICES = "clear-devices"
    RECOVER = "recover"
    PLUG = "plug"


@dataclass(frozen=True, slots=True)
class Drift:
    vm_uuid: str
    vm_name: str
    detail: str
    remedy: str
    mend: Mend = Mend.NOTHING


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at a host: its VMs, the database's promises (uuid to name and record), devices of traffic control by
    owner, state folders, snapshots, operations that are open though nobody holds their lock, and by VM the load of a
    saved snapshot that ended without taking back or giving up the disks from before it, what snapshots left in its
    disks whose RAM is gone, which VMs have an operation that is open, which are quarantined, with what ends it, and
    which lack disks that were to be unplugged for a reset only."""

    vms: Sequence[Vm]
    promised: Mapping[str, tuple[str, Record | None]]
    devices: Mapping[str, tuple[str, ...]]
    folders: Sequence[str]
    # Folders that nobody is at, of VMs that are not listed: the name as the journal knows it, and the path.
    left: Mapping[str, tuple[str, str]]
    snapshots: Sequence[Snapshot]
    orphans: Sequence[Operation]
    kept: Mapping[str, str]
    stray: Mapping[str, Sequence[StrayTag]]
    opened: Set[str]
    quarantined: Mapping[str, tuple[str, str]]
    lost: Mapping[str, Sequence[str]]


# Reasons of libvirt's for a pause that somebody wanted, or that ends by itself.
_MEANT = ("user", "starting-up")


def drifts(facts: Facts) -> tuple[Drift, ...]:
    """Everything that has come apart, in a stable order. A VM without a promise and without a folder here is that of
    another database, which may be at it right now: whatever of it could be mended is that one's."""
    known = {vm.uuid: vm for vm in facts.vms}
    own = {*facts.promised, *facts.folders}
    found = [d for vm in facts.vms for d in _of_vm(vm, facts.promised.get(vm.uuid), vm.uuid in own)]
    found += [d for vm in facts.vms for d in _paused(vm, facts, vm.uuid in own)]
    for uuid, (name, _) in facts.promised.items():
        if uuid not in known:
            found.append(Drift(uuid, name, "promised, but libvirt does not list it", "hvctl doctor --fix", Mend.FORGET))
    for uuid, names in facts.devices.items():
        if uuid not in known:
            detail = f"traffic control of a VM that is not there: {', '.join(names)}"
            found.append(Drift(uuid, uuid, detail, "hvctl doctor --fix", Mend.CLEAR_DEVICES))
        elif not known[uuid].state.active and uuid in own:
            detail = f"traffic control of a VM that is off: {', '.join(names)}"
            found.append(Drift(uuid, known[uuid].name, detail, "hvctl doctor --fix", Mend.CLEAR_DEVICES))
    for uuid, (name, path) in facts.left.items():
        remedy = f"if `virsh dominfo {uuid}` knows none either, and nobody wants its disks: rm -r {quote(path)}"
        found.append(Drift(uuid, name, "the state folder of a VM that is not there any more", remedy))
    found += _of_snapshots(facts.snapshots, known)
    for uuid, load in facts.kept.items():
        if uuid not in known:
            continue
        name = known[uuid].name
        detail = f"disks from before a load that was given up lie beside the VM's: *.{load}.old"
        found.append(Drift(uuid, name, detail, f"hvctl operation list, then decide which disks {name} keeps"))
    for uuid, tags in facts.stray.items():
        size = format_size(sum(t.bytes for t in tags))
        detail = f"{len(tags)} snapshots whose RAM is gone are still in its disks and hold {size} there"
        found.append(Drift(uuid, known[uuid].name, detail, "hvctl doctor --fix", Mend.DROP_TAGS))
    for uuid, targets in facts.lost.items():
        detail = f"its guest let go of {', '.join(targets)} after the reset that asked for it had ended"
        found.append(Drift(uuid, known[uuid].name, detail, "hvctl doctor --fix", Mend.PLUG))
    for operation in facts.orphans:
        detail = f"operation {operation.id} ({operation.kind}) is open and its owner is gone"
        found.append(Drift(operation.vm_uuid, operation.vm_name, detail, "hvctl recover", Mend.RECOVER))
    return tuple(found)


def _of_vm(vm: Vm, promise: tuple[str, Record | None] | None, own: bool) -> list[Drift]:
    found: list[Drift] = []
    record = vm.record
    differing = _differences(record.allocation, vm.allocation) if record else []
    if differing and promise and vm.state in (State.RUNNING, State.PAUSED):
        detail = f"promised and in force differ: {'; '.join(differing)}"
        found.append(Drift(vm.uuid, vm.name, detail, "hvctl doctor --fix", Mend.REALLOCATE))
    stored = promise[1] if promise else None
    if record is not None and stored != record and own:
        detail = (
            "the database and the domain's metadata promise different things"
            if stored
            else ("the domain's metadata promises what the database does not know")
        )
        found.append(Drift(vm.uuid, vm.name, detail, "hvctl doctor --fix", Mend.RECORD))
    elif record is None and stored is not None:
        detail = "the domain's metadata lost what the database promised"
        found.append(Drift(vm.uuid, vm.name, detail, "hvctl doctor --fix", Mend.RECORD))
    for nic in vm.nics:
        if nic.foreign:
            detail = f"{nic.tap} carries traffic control that hvctl did not make: {nic.foreign}"
            found.append(Drift(vm.uuid, vm.name, detail, f"tc qdisc show dev {nic.tap}"))
    return found


def _paused(vm: Vm, facts: Facts, own: bool) -> list[Drift]:
    """A guest that may be of two moments must not go on: what ends its operation, or its quarantine, is the remedy. One
    of another database may be in the middle of such an operation, where libvirt knows of no reason."""
    if vm.uuid in facts.quarantined:
        why, remedy = facts.quarantined[vm.uuid]
        return [Drift(vm.uuid, vm.name, f"quarantined: {why}", remedy)]
    if vm.state is not State.PAUSED or vm.reason in _MEANT or vm.uuid in facts.opened:
        return []
    if vm.reason == "unknown" and not own:
        return []
    return [Drift(vm.uuid, vm.name, f"paused: {vm.reason}", f"virsh resume {vm.name}, once the cause is gone")]


def _differences(promised: Allocation, actual: Allocation) -> list[str]:
    pairs = [
        ("vcpus", str(promised.vcpus), str(actual.vcpus)),
        ("memory", format_size(promised.memory), format_size(actual.memory)),
        ("cpu_quota", str(promised.cpu_quota), str(actual.cpu_quota)),
        ("cpu_weight", str(promised.cpu_weight), str(actual.cpu_weight)),
    ]
    for nic in actual.nics:
        want = promised.nic(nic.mac)
        pairs.append((f"net_in {nic.mac}", format_rate(want.inbound), format_rate(nic.inbound)))
        pairs.append((f"net_out {nic.mac}", format_rate(want.outbound), format_rate(nic.outbound)))
    for disk in actual.disks:
        pairs.append((f"disk {disk.target}", str(promised.disk(disk.target)), str(disk)))
    return [f"{name} {a}, is {b}" for name, a, b in pairs if a != b]


def _of_snapshots(snapshots: Sequence[Snapshot], known: Mapping[str, Vm]) -> list[Drift]:
    stale: dict[str, int] = {}
    for snapshot in snapshots:
        vm = known.get(snapshot.vm_uuid)
        if vm is None or vm.process != snapshot.binding.process:
            stale[snapshot.vm_uuid] = stale.get(snapshot.vm_uuid, 0) + 1
    return [
        Drift(
            uuid,
            known[uuid].name if uuid in known else uuid,
            f"{count} snapshots of a QEMU process that has ended still take memory",
            "hvctl doctor --fix",
            Mend.DROP_SNAPSHOTS,
        )
        for uuid, count in stale.items()
    ]
