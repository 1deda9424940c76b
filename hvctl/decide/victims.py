"""Who may be interrupted, how, what it gives back, and what it costs: filters that say no with a reason, weighers whose
product is the cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hvctl.decide.allocate import MIN_MEMORY, memory_floor
from hvctl.model.allocation import Allocation, DiskLimit, Record, Resources, resources
from hvctl.model.plan import Refusal
from hvctl.model.pool import Need, Rung
from hvctl.model.vm import Balloon, State, Vm

LADDER = tuple(Rung)
MIB = 1 << 20
SQUEEZED_CPU = 10
"""Percent of one CPU that a squeezed VM keeps: it stays reachable."""
LEAST_IOPS = 10
IOPS_HEADROOM = 4
"""A squeezed VM keeps LEAST_IOPS, or what it uses and a quarter more."""
SAVE_RATE = 100 * MIB
"""Bytes a second that a save or its return are taken for while nothing is known of them."""
UNKNOWN_AGE = 86_400.0
"""Seconds of work that a VM is taken to lose of which nobody knows how long it runs."""
_HOUR = 3600.0
_RESTART = {Rung.SQUEEZE: 1.0, Rung.PAUSE: 2.0, Rung.SAVE: 10.0, Rung.SHUTDOWN: 60.0, Rung.POWER_OFF: 60.0}


@dataclass(frozen=True, slots=True)
class Weights:
    """priority 0 to 1000; restart: seconds until it is back at work, as predicted; lost: seconds of work that are gone;
    available: the share of its need that the pool is predicted to have at its return, 0 to 1."""

    priority: int
    restart: float
    lost: float
    available: float


def cost_of(weights: Weights) -> float:
    """The product of the weighers, above 0: each is 1 for what is usual (priority 500, nothing lost, room at return),
    but for the restart, which is in seconds. No room at return counts ten times."""
    priority = (1 + weights.priority) / 501
    return priority * max(0.1, weights.restart) * (1 + weights.lost / _HOUR) / max(0.1, weights.available)


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything known of one VM that matters for its interruption. age is seconds since its start or its last snapshot
    (None: nobody knows), restart the seconds that its returns took by rung, holds what it is promised or has, had what
    it was promised before an interruption that lasts, iops the most requests per second of its newest samples."""

    vm: Vm
    holds: Resources
    need: Need
    balloon: Balloon | None = None
    age: float | None = None
    restart: Mapping[Rung, float] = field(default_factory=dict)
    snapshots: int = 0
    busy: bool = False
    had: Record | None = None
    iops: int | None = None

    @property
    def record(self) -> Record:
        return self.vm.record or Record(self.vm.allocation)

    @property
    def whole(self) -> Record:
        """What it is to have again when it is not interrupted."""
        return self.record if self.had is None else self.record.with_allocation(self.had.allocation)


def refusal_of(seen: Seen, owner: str, done: frozenset[str]) -> Refusal | None:
    """Why a VM is no victim; done are those that were interrupted for this demand already."""
    vm = seen.vm
    set_it = f"hvctl vm set {vm.name} --interruptible"
    if vm.protected:
        return Refusal(f"{vm.name} is protected.", f"hvctl vm protect {vm.name} --off")
    if vm.record is None or not vm.record.interruptible:
        return Refusal(f"{vm.name} is not interruptible.", set_it)
    if vm.state is not State.RUNNING:
        return Refusal(f"{vm.name} is {vm.state} ({vm.reason}).", f"hvctl vm show {vm.name}")
    if owner in (vm.name, vm.uuid):
        return Refusal(f"{vm.name} is who asks.", "name another owner")
    if vm.uuid in done:
        return Refusal(f"{vm.name} was interrupted for this demand before.", "hvctl operation list")
    if seen.busy:
        return Refusal(f"{vm.name} has an open operation.", f"hvctl operation list --vm {vm.name}")
    return None


def squeezed(seen: Seen, margin: int, lacking: Resources | None = None) -> Allocation:
    """What a VM is left with on the first rung: memory that it uses and a margin, a little of one CPU, and the IOPS
    that it uses and some; more, where less than that is lacking (None: all of it is). Its statistics can only keep it
    larger: what it does not report, it is not asked for."""
    has = seen.record.allocation
    floor = memory_floor(seen.balloon, margin) if seen.balloon and seen.vm.has_balloon else None
    memory = has.memory
    if floor is not None:
        least = has.memory if lacking is None else lacking.memory
        memory = min(has.memory, _whole(max(MIN_MEMORY, floor, has.memory - least)))
    quota, cpu = has.cpu_quota, resources(has).cpu
    low = SQUEEZED_CPU if lacking is None else max(SQUEEZED_CPU, cpu - lacking.cpu)
    return replace(has, memory=memory, cpu_quota=low if low < cpu else quota, disks=_slower(seen, lacking))


def _slower(seen: Seen, lacking: Resources | None) -> tuple[DiskLimit, ...]:
    """With less IOPS for its one disk that has a limit: of several nobody knows which of them uses what."""
    disks = seen.record.allocation.disks
    limits = [d.iops for d in disks if d.iops]
    if seen.iops is None or len(limits) != 1:
        return disks
    (limit,) = limits
    used = max(LEAST_IOPS, seen.iops + seen.iops // IOPS_HEADROOM)
    low = min(limit, max(used, 0 if lacking is None else limit - lacking.iops))
    return tuple(replace(d, iops=low) if d.iops else d for d in disks)


def _whole(size: int) -> int:
    """In whole MiB, upwards."""
    return -(-size // MIB) * MIB


def left(seen: Seen, rung: Rung, margin: int, lacking: Resources | None = None) -> Resources:
    """What the VM still holds of its host after it was interrupted like this."""
    if rung is Rung.SQUEEZE:
        return resources(squeezed(seen, margin, lacking)).least(seen.holds)
    return Resources(memory=seen.holds.memory) if rung is Rung.PAUSE else Resources()


def possible(seen: Seen, rung: Rung, grace: float, within: float | None) -> bool:
    """Whether there is time for it, and libvirt can do it."""
    if rung is Rung.SAVE and not seen.vm.persistent:
        return False
    return within is None or seconds_for(seen, rung, grace) <= within


def seconds_for(seen: Seen, rung: Rung, grace: float) -> float:
    """How long the interruption takes at most, as predicted."""
    match rung:
        case Rung.SQUEEZE | Rung.PAUSE | Rung.POWER_OFF:
            return 0.0 if rung is Rung.POWER_OFF else grace + 5.0
        case Rung.SAVE:
            return grace + 5.0 + seen.vm.allocation.memory / SAVE_RATE
        case Rung.SHUTDOWN:
            return 2 * grace + 5.0


def weights_of(seen: Seen, rung: Rung, available: float) -> Weights:
    restart = seen.restart.get(rung)
    if restart is None:
        restart = _RESTART[rung] + (seen.vm.allocation.memory / SAVE_RATE if rung is Rung.SAVE else 0.0)
    lost = (UNKNOWN_AGE if seen.age is None else seen.age) if rung.loses_work else 0.0
    if rung.ends_process and seen.snapshots and not rung.loses_work:
        # They live in the QEMU process: who comes back from a save has none to be reset to.
        restart *= 1 + seen.snapshots
    return Weights(seen.record.priority, restart, lost, available)
