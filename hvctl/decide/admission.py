"""Whether a host still has room: the sum of what is promised stays within capacity x overcommit minus the reserve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hvctl.decide.reservations import FOREVER, in_force, kept_by_others, owned, total
from hvctl.model.allocation import Resources, resources
from hvctl.model.host import Capacity, HostFacts, Ledger
from hvctl.model.plan import Refusal
from hvctl.model.pool import Reservation
from hvctl.model.vm import Vm
from hvctl.settings import Settings
from hvctl.units import format_rate, format_size

FORMAT: dict[str, Callable[[int], str]] = {
    "cpu": lambda v: f"{v / 100:g} CPUs",
    "memory": format_size,
    "network": format_rate,
    "iops": lambda v: f"{v} IOPS",
}


def capacity_of(facts: HostFacts, settings: Settings) -> Capacity:
    """cpu = (CPUs x overcommit - reserve) in percent, memory likewise in bytes; the rest only as configured."""
    return Capacity(
        cpu=int(facts.cpus * 100 * settings.cpu_overcommit) - settings.reserve_cpus * 100,
        memory=int(facts.memory * settings.memory_overcommit) - settings.reserve_memory,
        network=settings.network_capacity,
        iops=settings.iops_capacity,
    )


def holders(ledger: Ledger, observed: Iterable[Vm]) -> dict[str, tuple[str, Resources]]:
    """Who holds what: uuid to (name, resources).

    A promise counts unless its VM was seen to be off; a VM that is not in the listing still counts, because unknown
    is not gone. A running VM that nobody promised anything counts with what it has.
    """
    seen = {vm.uuid: vm for vm in observed}
    held: dict[str, tuple[str, Resources]] = {}
    for promise in ledger.promised:
        vm = seen.get(promise.vm_uuid)
        off = vm is not None and not vm.state.active
        if promise.holds and (not off or promise.busy):
            held[promise.vm_uuid] = (promise.vm_name, promise.resources)
    for vm in seen.values():
        if vm.state.active and vm.uuid not in held:
            held[vm.uuid] = (vm.name, resources(vm.allocation))
    return held


def admit(
    capacity: Capacity,
    held: dict[str, tuple[str, Resources]],
    uuid: str,
    want: Resources,
    reservations: Sequence[Reservation] = (),
    name: str = "",
    now: float = 0.0,
) -> Refusal | None:
    """None if `want` fits for this VM from now on; otherwise which resource lacks how much, and who holds it.

    What does not grow is never refused, so that a host that is over its capacity can be relieved. What others have
    reserved for later counts already, since nobody takes a VM's resources back when that time comes; but for what is
    inside the VM's own reservation only until that ends."""
    own = held.get(uuid, ("", Resources()))[1]
    others = {u: h for u, h in held.items() if u != uuid}
    mine = frozenset({uuid, name} - {""})
    active = [r for r in owned(reservations, mine) if in_force(r, now).any]
    inside = total(active, now)
    until = max((FOREVER if r.ends_at is None else r.ends_at for r in active), default=now)
    ever = kept_by_others(reservations, held, mine, now, FOREVER)
    soon = kept_by_others(reservations, held, mine, now, until) if active else ever
    lacking: list[str] = []
    holding: list[str] = []
    for resource, text in FORMAT.items():
        limit = getattr(capacity, resource)
        asked = getattr(want, resource)
        if limit is None or asked <= getattr(own, resource):
            continue
        reserved = getattr(soon if asked <= getattr(inside, resource) else ever, resource)
        used = sum(getattr(r, resource) for _, r in others.values()) + reserved
        if used + asked > limit:
            free = text(max(0, limit - used))
            lacking.append(f"{resource} lacks {text(used + asked - limit)} ({text(asked)} asked, {free} free)")
            top = sorted(others.values(), key=lambda h: getattr(h[1], resource), reverse=True)[:5]
            holding += [f"{n} {text(getattr(r, resource))}" for n, r in top if getattr(r, resource)]
            holding += [f"reservations {text(reserved)}"] if reserved else []
    if not lacking:
        return None
    return Refusal(
        f"it does not fit on this host: {'; '.join(lacking)}.",
        f"held by {', '.join(holding)}" if holding else "the host itself is too small: see `hvctl pool show`",
    )
