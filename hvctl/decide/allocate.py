"""From what a VM has and what is asked to the steps that lead there: first everything that shrinks, then what grows,
so that no resource passes the larger of before and after at any moment, and any interrupted prefix is safe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hvctl.model.allocation import (
    KEEP,
    Allocation,
    Change,
    DiskChange,
    DiskLimit,
    Keep,
    NicChange,
    NicLimit,
    Record,
)
from hvctl.model.operation import Phase
from hvctl.model.plan import (
    Enter,
    Plan,
    Refusal,
    SetCpuQuota,
    SetCpuWeight,
    SetDiskLimit,
    SetMemory,
    SetNicLimit,
    SetRecord,
    SetVcpus,
    Step,
)
from hvctl.model.vm import Balloon, State, Vm
from hvctl.units import format_rate, format_size

MIN_MEMORY = 16 << 20


def goal_of(vm: Vm, change: Change) -> Allocation | Refusal:
    """The whole allocation that a change leads to, or why the VM cannot have it (capacity is not asked here)."""
    now = vm.allocation
    vcpus = now.vcpus if isinstance(change.vcpus, Keep) else change.vcpus
    memory = now.memory if isinstance(change.memory, Keep) else change.memory
    if not 1 <= vcpus <= vm.max_vcpus:
        return Refusal(
            f"{vm.name} can have 1 to {vm.max_vcpus} vCPUs, not {vcpus}.", "the maximum is set by vm create --max-vcpus"
        )
    if not MIN_MEMORY <= memory <= vm.max_memory:
        return Refusal(
            f"{vm.name} can have {format_size(MIN_MEMORY)} to {format_size(vm.max_memory)} of memory, "
            f"not {format_size(memory)}.",
            "the maximum is set by vm create --max-memory",
        )
    if memory % 1024:
        return Refusal(f"memory is given in whole KiB, and {memory} bytes are not.", "write it as 512MiB")
    quota = now.cpu_quota if isinstance(change.cpu_quota, Keep) else change.cpu_quota
    if quota is not None and not 1 <= quota <= 100 * 4096:
        return Refusal(f"a CPU quota of {quota}% is outside 1% to {100 * 4096}%.", "100% is one whole CPU")
    weight = now.cpu_weight if isinstance(change.cpu_weight, Keep) else change.cpu_weight
    if weight is not None and not 1 <= weight <= 10000:
        return Refusal(f"a CPU weight of {weight} is outside 1 to 10000.", "100 is the default weight")
    nics = _changed_nics(vm, change.nics)
    if isinstance(nics, Refusal):
        return nics
    disks = _changed_disks(vm, change.disks)
    if isinstance(disks, Refusal):
        return disks
    return Allocation(vcpus, memory, quota, weight, nics, disks)


def promised_after(vm: Vm, change: Change) -> Allocation | Refusal:
    """What is promised once the change is made. What it does not name stays promised as it was, whatever is in force
    now: a balloon on its way, or a limit that somebody else moved, does not become a promise."""
    return goal_of(vm if vm.record is None else replace(vm, allocation=vm.record.allocation), change)


def with_parts(now: Allocation, source: Allocation, other: Allocation) -> Allocation:
    """`now` with those parts taken from `source` in which `source` and `other` differ."""
    names = ("vcpus", "memory", "cpu_quota", "cpu_weight")
    parts = {n: getattr(source, n) for n in names if getattr(source, n) != getattr(other, n)}
    nics = tuple(source.nic(n.mac) if source.nic(n.mac) != other.nic(n.mac) else n for n in now.nics)
    disks = tuple(source.disk(d.target) if source.disk(d.target) != other.disk(d.target) else d for d in now.disks)
    return replace(now, nics=nics, disks=disks, **parts)


def _merged(limit: NicLimit | DiskLimit, change: NicChange | DiskChange, names: Iterable[str]) -> dict[str, int | None]:
    asked = {name: getattr(change, name) for name in names}
    return {name: getattr(limit, name) if value is KEEP else value for name, value in asked.items()}


def _changed_nics(vm: Vm, changes: tuple[NicChange, ...]) -> tuple[NicLimit, ...] | Refusal:
    limits = {n.mac: vm.allocation.nic(n.mac) for n in vm.nics}
    for change in changes:
        chosen = [n for n in vm.nics if change.nic in (None, n.mac, n.tap)]
        if not chosen:
            have = ", ".join(n.tap or n.mac for n in vm.nics) or "none"
            return Refusal(
                f"{vm.name} has no NIC {change.nic}." if change.nic else f"{vm.name} has no NIC.", f"its NICs: {have}"
            )
        for nic in chosen:
            if nic.foreign:
                return Refusal(
                    f"{nic.tap} of {vm.name} carries traffic control that hvctl did not make: {nic.foreign}.",
                    f"look at it with `tc qdisc show dev {nic.tap}`; hvctl shapes the NIC once it is removed",
                )
            values = _merged(limits[nic.mac], change, ("inbound", "outbound"))
            for value in values.values():
                if value is not None and value < 8000:
                    return Refusal(f"a rate of {format_rate(value)} is too low to carry a packet.", "use 8kbit or more")
            limits[nic.mac] = NicLimit(nic.mac, **values)
    return tuple(limits[n.mac] for n in vm.nics)


def _changed_disks(vm: Vm, changes: tuple[DiskChange, ...]) -> tuple[DiskLimit, ...] | Refusal:
    names = ("iops", "rate", "iops_burst", "rate_burst", "burst_seconds")
    limits = {d.target: vm.allocation.disk(d.target) for d in vm.disks}
    for change in changes:
        chosen = [d for d in vm.disks if change.disk in (d.target, d.name) or (change.disk is None and d.writable)]
        if not chosen:
            have = ", ".join(d.target for d in vm.disks) or "none"
            return Refusal(
                f"{vm.name} has no disk {change.disk}." if change.disk else f"{vm.name} has no writable disk.",
                f"its disks: {have}",
            )
        for disk in chosen:
            limit = DiskLimit(disk.target, **_merged(limits[disk.target], change, names))
            wrong = _wrong_disk_limit(limit)
            if wrong:
                return Refusal(f"{disk.target} of {vm.name}: {wrong}", "raise the burst, or drop it with `none`")
            limits[disk.target] = limit
    return tuple(limits[d.target] for d in vm.disks)


def _wrong_disk_limit(limit: DiskLimit) -> str | None:
    for name, value in (("IOPS limit", limit.iops), ("rate", limit.rate), ("burst length", limit.burst_seconds)):
        if value is not None and value < 1:
            return f"a {name} of {value} stops the disk."
    for name, steady, burst in (("IOPS", limit.iops, limit.iops_burst), ("rate", limit.rate, limit.rate_burst)):
        if burst is not None and (steady is None or burst < steady):
            return f"the {name} burst {burst} needs a steady limit that is not above it."
    if limit.burst_seconds is not None and limit.iops_burst is None and limit.rate_burst is None:
        return "a burst length needs a burst."
    return None


def memory_floor(balloon: Balloon, margin: int) -> int | None:
    """The lowest balloon target in bytes that leaves the guest what it uses: actual - usable + margin.

    `actual` is the balloon's size and `usable` the guest's MemAvailable (virtio 1.2, 5.5.6.3), so what the kernel
    itself holds counts as used. None when the guest does not report.
    """
    if not balloon.reported:
        return None
    return balloon.actual - (balloon.usable or 0) + margin


def _least(a: int | None, b: int | None) -> int | None:
    """The tighter of two limits; None is unlimited."""
    return b if a is None else a if b is None else min(a, b)


def _tightest_nic(a: NicLimit, b: NicLimit) -> NicLimit:
    return NicLimit(a.mac, _least(a.inbound, b.inbound), _least(a.outbound, b.outbound))


def _tightest_disk(a: DiskLimit, b: DiskLimit) -> DiskLimit:
    """Both steady limits at their tighter value; no burst in between, so that no mixture is ever invalid."""
    if a == b:
        return a
    return DiskLimit(a.target, _least(a.iops, b.iops), _least(a.rate, b.rate))


def plan_allocation(
    vm: Vm,
    goal: Allocation,
    record: Record | None,
    balloon: Balloon | None,
    *,
    margin: int,
    force: bool = False,
    best_effort: bool = False,
) -> Plan | Refusal:
    """Steps from what is in force to `goal`; `record` is what will be promised (None: leave the promise alone).

    The balloon is needed only when a running VM gives memory away.
    """
    now = vm.allocation
    memory = goal.memory
    reasons: list[str] = []
    if memory < now.memory and vm.state is not State.OFF:
        answer = _shrunk_memory(vm, memory, balloon, margin, force, best_effort)
        if isinstance(answer, Refusal):
            return answer
        memory, why = answer
        reasons += why
    set_memory = SetMemory(vm.uuid, memory, force, best_effort)
    shrink: list[Step] = []
    grow: list[Step] = []
    if memory != now.memory:
        (shrink if memory < now.memory else grow).append(set_memory)
    if goal.vcpus != now.vcpus:
        (shrink if goal.vcpus < now.vcpus else grow).append(SetVcpus(vm.uuid, goal.vcpus))
    if goal.cpu_quota != now.cpu_quota:
        tighter = _least(goal.cpu_quota, now.cpu_quota) == goal.cpu_quota
        (shrink if tighter else grow).append(SetCpuQuota(vm.uuid, goal.cpu_quota))
    if goal.cpu_weight != now.cpu_weight:
        grow.append(SetCpuWeight(vm.uuid, goal.cpu_weight))
    for disk in goal.disks:
        have = now.disk(disk.target)
        low = _tightest_disk(have, disk)
        shrink += [SetDiskLimit(vm.uuid, low)] if low not in (have, disk) else []
        if disk != have:
            (shrink if disk == low else grow).append(SetDiskLimit(vm.uuid, disk))
    for nic in goal.nics if vm.state is not State.OFF else ():
        present = now.nic(nic.mac)
        low_nic = _tightest_nic(present, nic)
        shrink += [SetNicLimit(vm.uuid, low_nic)] if low_nic not in (present, nic) else []
        if nic != present:
            (shrink if nic == low_nic else grow).append(SetNicLimit(vm.uuid, nic))
    effects: list[Step] = shrink + grow
    if record is not None and memory != goal.memory:
        record = record.with_memory(memory)
    if record is not None and record != vm.record:
        effects.append(SetRecord(vm.uuid, record))
    if not effects:
        return Plan(f"allocate {vm.name}", (), ("everything is as asked already",))
    return Plan(f"allocate {vm.name}", (Enter(Phase.TOUCHING), *effects), tuple(reasons))


def _shrunk_memory(
    vm: Vm, target: int, balloon: Balloon | None, margin: int, force: bool, best_effort: bool
) -> tuple[int, list[str]] | Refusal:
    if not vm.has_balloon:
        return Refusal(f"{vm.name} has no balloon device, so its memory cannot change while it runs.", "stop it first")
    floor = memory_floor(balloon, margin) if balloon else None
    if floor is None:
        if force:
            return target, ["forced: the guest reports no memory statistics"]
        return Refusal(
            f"{vm.name} reports no memory statistics, so nobody knows what it can give.",
            "check the guest's balloon driver, or use --force to shrink it blindly",
        )
    if target >= floor:
        return target, []
    if best_effort:
        lowest = min(vm.allocation.memory, -(-floor // (1 << 20)) * (1 << 20))
        return lowest, [f"best effort: {format_size(lowest)} is the least that leaves the guest what it uses"]
    return Refusal(
        f"{vm.name} uses memory that {format_size(target)} would not hold: the least it can have now is "
        f"{format_size(floor)} (used {format_size(floor - margin)} plus a margin of {format_size(margin)}).",
        "use --best-effort to take what can be taken",
    )
