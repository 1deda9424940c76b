"""What reservations hold of a host, and when: the part of admission's arithmetic that looks at time.

A reservation counts for its owner at once with what the owner is promised: the larger of the two holds. For everybody
else it counts from its start to its end, less what has decayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hvctl.model.allocation import Resources
from hvctl.model.host import Capacity
from hvctl.model.pool import Held, Reservation

Holders = Mapping[str, tuple[str, Resources]]
COUNTED = ("cpu", "memory", "network", "iops")
UNLIMITED = 1 << 62
FOREVER = math.inf


@dataclass(frozen=True, slots=True)
class Wanted:
    """A reservation to make; times are seconds since 1970, ends_at None is until it is released."""

    owner: str
    reason: str
    size: Resources
    starts_at: float
    ends_at: float | None
    half_life: float | None = None


def new_reservation(wanted: Wanted, now: float, who: str, state: Held = Held.HELD) -> Reservation:
    """As it is before anybody looked whether there is room for it."""
    return Reservation(
        0, wanted.owner, wanted.reason, wanted.size, wanted.size, state, wanted.starts_at, wanted.ends_at,
        wanted.half_life, max(now, wanted.starts_at), now, who, accounted_at=now,
    )  # fmt: skip


def in_force(reservation: Reservation, at: float) -> Resources:
    """What it keeps at a moment; never more than it kept earlier."""
    ends = FOREVER if reservation.ends_at is None else reservation.ends_at
    if reservation.state is Held.ENDED or not reservation.starts_at <= at < ends:
        return Resources()
    kept = reservation.granted
    if reservation.half_life is None or at <= reservation.idle_since:
        return kept
    share = 0.5 ** ((at - reservation.idle_since) / reservation.half_life)
    used = reservation.used.least(kept)
    idle = kept - used
    return used + Resources(*(math.ceil(getattr(idle, n) * share) for n in COUNTED))


def owned(reservations: Iterable[Reservation], own: frozenset[str]) -> list[Reservation]:
    return [r for r in reservations if r.owner in own]


def total(reservations: Iterable[Reservation], at: float) -> Resources:
    return sum((in_force(r, at) for r in reservations), Resources())


def beyond(reservations: Iterable[Reservation], held: Holders, own: frozenset[str], at: float) -> dict[str, Resources]:
    """By owner, others than `own`: what reservations keep on top of what their owners hold already."""
    by_name = {name: uuid for uuid, (name, _) in held.items()}
    kept: dict[str, Resources] = {}
    for reservation in reservations:
        if reservation.owner not in own:
            owner = by_name.get(reservation.owner, reservation.owner)
            kept[owner] = kept.get(owner, Resources()) + in_force(reservation, at)
    nothing = ("", Resources())
    return {o: more for o, r in kept.items() if (more := r - held.get(o, nothing)[1]).any}


def turns(reservations: Iterable[Reservation], start: float, end: float) -> list[float]:
    """The moments from start to end at which more may be kept than right before: at every other one it is less."""
    return sorted({start, *(r.starts_at for r in reservations if start < r.starts_at < end)})


def kept_by_others(
    reservations: Sequence[Reservation], held: Holders, own: frozenset[str], start: float, end: float
) -> Resources:
    """The most that others' reservations keep, of each resource, at any moment from start to end."""
    most = Resources()
    for at in turns(reservations, start, end):
        most = most.largest(sum(beyond(reservations, held, own, at).values(), Resources()))
    return most


def room(
    capacity: Capacity,
    held: Holders,
    reservations: Sequence[Reservation],
    own: frozenset[str],
    start: float,
    end: float = FOREVER,
) -> Resources:
    """What `own` (uuid, name) may hold in total from start to end, its own promise and reservations included."""
    others = sum((r for uuid, (name, r) in held.items() if not own & {uuid, name}), Resources())
    taken = others + kept_by_others(reservations, held, own, start, end)
    limits = (getattr(capacity, n) for n in COUNTED)
    return Resources(*(UNLIMITED if c is None else c for c in limits)) - taken


def grantable(
    capacity: Capacity,
    held: Holders,
    reservations: Sequence[Reservation],
    reservation: Reservation,
    names: Mapping[str, str],
    now: float,
) -> Resources:
    """What a reservation may keep from its start (or now) to its end, others and its owner's own counted. names are
    those of the VMs that were observed, by UUID."""
    same = {u for u, (name, _) in held.items() if reservation.owner in (u, name)}
    same |= {u for u, name in names.items() if reservation.owner in (u, name)}
    known = {names[u] for u in same if u in names} | {held[u][0] for u in same if u in held}
    own = frozenset({reservation.owner, *same, *known})
    start = max(now, reservation.starts_at)
    end = FOREVER if reservation.ends_at is None else reservation.ends_at
    mine = total(owned(reservations, own), start)
    return (room(capacity, held, reservations, own, start, end) - mine).least(reservation.size)


def settled(reservation: Reservation, used: Resources, now: float) -> Reservation:
    """The same reservation looked at now: what decayed is gone for good, what is used is noted, and time is added up.
    It never grows, since others may have been given what it gave back."""
    kept = in_force(reservation, now)
    counted = used.least(kept)
    since = max(reservation.accounted_at, reservation.starts_at)
    seconds = max(0.0, min(now, FOREVER if reservation.ends_at is None else reservation.ends_at) - since)
    begun = now >= reservation.starts_at and reservation.state is Held.HELD
    reserved, hit = dict(reservation.reserved_seconds), dict(reservation.used_seconds)
    for name in COUNTED if begun else ():
        reserved[name] = reserved.get(name, 0.0) + getattr(kept, name) * seconds
        hit[name] = hit.get(name, 0.0) + getattr(counted, name) * seconds
    return replace(
        reservation,
        granted=kept if begun and reservation.half_life is not None else reservation.granted,
        idle_since=now if begun and reservation.half_life is not None else reservation.idle_since,
        used=counted if begun else reservation.used,
        reserved_seconds=reserved,
        used_seconds=hit,
        accounted_at=max(reservation.accounted_at, now),
    )


def hit_rates(reservation: Reservation) -> dict[str, float]:
    """Of each resource that was kept, the share of it that was used, over time."""
    kept = reservation.reserved_seconds
    return {n: reservation.used_seconds.get(n, 0.0) / s for n, s in kept.items() if s > 0}
