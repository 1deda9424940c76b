"""Whether a guard's policy makes sense: asked when a file is read, and again of what a VM's record holds, since anybody
who may edit the domain may have written that."""

from __future__ import annotations

import math

from hvctl.decide.scope import parse_scope
from hvctl.errors import UsageError
from hvctl.model.guard import Act, Allowed, GuardPolicy
from hvctl.model.reset import WHOLE, Scope

ALONE = tuple(a.value for a in (Act.GROW, Act.CACHE, Act.NET, Act.WHOLE))
WORDS = f"{', '.join(ALONE)}, disk:NAME, ram:BASE-END"
_TIMES = (("threshold", 0.0), ("horizon", 10.0), ("window", 10.0), ("cool_down", 1.0), ("keep", 1.0))
_LONGEST = 7 * 86400.0
_SHARES = ("release", "disk_full")


def scope_of(part: str) -> Scope:
    """What goes back with a part of a policy; UsageError. Growing is no reset."""
    if part == Act.WHOLE:
        return WHOLE
    scope = parse_scope([part])
    one = len(scope.disks or ()) + len(scope.ranges) + scope.cache + scope.net
    if scope.ram or scope.devices or scope.disks is None or one != 1:
        raise UsageError(f"{part!r} is not one part that a guard can do.", f"parts: {WORDS}")
    return scope


def problem(policy: GuardPolicy) -> str | None:
    """What is wrong with it, None if nothing is."""
    for name, least in _TIMES:
        value = getattr(policy, name)
        if not least <= value <= _LONGEST:
            return f"{name} is {value:g} s, and can be {least:g} s to {_LONGEST:g} s"
    for name in _SHARES:
        if not 0 < getattr(policy, name) <= 1:
            return f"{name} is a share between 0 and 1"
    if not 0 < policy.grow_by <= 10:
        return "grow_by is a share of what there is, up to 10"
    if not 1 <= policy.looks <= 1000:
        return "looks is a number from 1 to 1000"
    if any(v is not None and not 0 < v < 2**53 for v in (policy.resident, policy.connections)):
        return "resident and connections are above 0"
    if not policy.allow:
        return "it allows nothing"
    parts = [a.part for a in policy.allow]
    if len(set(parts)) < len(parts):
        return "it allows a part twice"
    return next((found for a in policy.allow if (found := _wrong(a, policy)) is not None), None)


def _wrong(allowed: Allowed, policy: GuardPolicy) -> str | None:
    if allowed.part != Act.GROW:
        try:
            scope_of(allowed.part)
        except UsageError:
            return f"{allowed.part!r} is not one part that a guard can do: {WORDS}"
    if allowed.act.needs_snapshot and not policy.to:
        return f"{allowed.part} goes back to a snapshot, and none is named: to"
    if not (0 <= allowed.worth <= 1 and math.isfinite(allowed.worth)):
        return "worth is between 0 and 1"
    if allowed.relief is not None and not (0 < allowed.relief <= 1 and allowed.relieves):
        return "relief is a share between 0 and 1 of the resources that relieves names"
    if (allowed.before or allowed.after) and allowed.act is not Act.DISK:
        return f"only a disk has hooks, and {allowed.part} is none"
    if not all(argv and argv[0] for argv in (*allowed.before, *allowed.after)):
        return "a hook names no program"
    return None
