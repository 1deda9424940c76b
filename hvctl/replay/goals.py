"""What a policy promises a VM, and what a victim comes back with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from hvctl.decide.allocate import MIN_MEMORY
from hvctl.decide.shrink import least
from hvctl.decide.victims import MIB, Seen
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.replay.fleet import Member
from hvctl.replay.host import MARGIN, Guest
from hvctl.replay.policy import Amount, Policy

PRESSED: Final = 0.95
"""Who uses this share of what it is promised is at its limit."""


def goal(policy: Policy, member: Member, seen: Seen, has: Allocation | None, used: Resources) -> Allocation:
    """seen: as if it were promised its size. has: what it is promised now; None: it starts."""
    if member.guaranteed:
        return member.size
    match policy.allocate:
        case Amount.FORECAST:
            if has is None and not seen.need.known:
                return member.size
            # What a neighbour that gives all it can is left with.
            low = least(seen, MARGIN)
            return low if has is None else pressed(policy, member, low, has, used)
        case Amount.PERCENT:
            return _share(policy, member)
        case _:
            return member.size


def pressed(policy: Policy, member: Member, goal: Allocation, has: Allocation, used: Resources) -> Allocation:
    """More than that, of what it was found to use all of."""
    size, most = resources(member.size), resources(has)
    if used.memory >= PRESSED * most.memory:
        memory = min(size.memory, int(most.memory * policy.pressing) // MIB * MIB)
        goal = replace(goal, memory=max(goal.memory, memory))
    if used.cpu >= PRESSED * most.cpu and goal.cpu_quota is not None:
        quota = max(goal.cpu_quota, math.ceil(most.cpu * policy.pressing))
        goal = replace(goal, cpu_quota=None if quota >= size.cpu else quota)
    return goal


def pressing(policy: Policy, guests: Iterable[Guest], used: Callable[[Guest], Resources]) -> dict[int, Allocation]:
    """Between two rounds: what those are to have that use all that they have, by number."""
    found = {}
    for guest in guests if policy.allocate is Amount.FORECAST and policy.pressing > 1 else ():
        m, has = guest.member, guest.allocation
        if has is not None and guest.away is None and not m.guaranteed:
            more = pressed(policy, m, has, has, used(guest))
            if more != has:
                found[m.number] = more
    return found


def returning(policy: Policy, member: Member, predicted: Allocation) -> tuple[Allocation, Resources]:
    """What it comes back with, of what it is predicted to need, and what is kept for that."""
    match policy.reserve:
        case Amount.FORECAST:
            goal = predicted
        case Amount.PERCENT:
            goal = _share(policy, member)
        case Amount.FULL:
            goal = member.size
        case _:
            return predicted, Resources()
    return goal, resources(goal)


def within(new: Allocation, got: Resources) -> Allocation:
    """As much of it as was got."""
    quota = new.cpu_quota if got.cpu >= resources(new).cpu else max(1, got.cpu)
    return replace(new, memory=max(MIN_MEMORY, min(new.memory, got.memory // MIB * MIB)), cpu_quota=quota)


def lower(now: Allocation, new: Allocation) -> Allocation:
    """What of it shrinks."""
    quota = now.cpu_quota if resources(now).cpu <= resources(new).cpu else new.cpu_quota
    return replace(now, memory=min(now.memory, new.memory), cpu_quota=quota)


def _share(policy: Policy, member: Member) -> Allocation:
    share = (policy.percent or 0.0) / 100
    size = resources(member.size)
    memory = max(MIN_MEMORY, int(size.memory * share) // MIB * MIB)
    return replace(member.size, memory=min(memory, size.memory), cpu_quota=max(1, int(size.cpu * share)))
