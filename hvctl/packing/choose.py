"""The host and the VMs on it that give what is asked at the least cost: bounds first for all hosts, exact work only on
those whose bound is below the best cover found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hvctl.model.allocation import Resources
from hvctl.packing.bounds import Floats, Ints, greedy, lower_bounds
from hvctl.packing.cover import COUNTED, Candidate, Cover
from hvctl.packing.exact import cheapest

EXACT = 1000
"""So many candidates are decided exactly; of more, the answer is within TOLERANCE of the cheapest."""
TOLERANCE = 0.02
_SAME = 1 - 1e-9


def cheapest_cover(
    candidates: Sequence[Candidate], lacking: Mapping[str, Resources], tolerance: float | None = None
) -> Cover | None:
    """The cheapest cover over all hosts, each of which lacks something else; None if no host can have one.

    The same candidates in any order have the same answer. tolerance: how much dearer than the cheapest it may be, as a
    share; None: nothing for few candidates, TOLERANCE for many."""
    hosts = sorted(lacking)
    number = {host: i for i, host in enumerate(hosts)}
    asked = np.array([_vector(lacking[h]) for h in hosts], dtype=np.int64).reshape(len(hosts), len(COUNTED))
    nothing = np.flatnonzero((asked <= 0).all(axis=1))
    if len(nothing):
        return Cover(hosts[int(nothing[0])], (), 0.0, 0.0)
    asked = np.maximum(asked, 0)
    listed = sorted((c for c in candidates if c.host in number), key=lambda c: (number[c.host], c.key))
    if not listed:
        return None
    if tolerance is None:
        tolerance = 0.0 if len(listed) <= EXACT else TOLERANCE
    host = np.array([number[c.host] for c in listed], dtype=np.int64)
    gives = np.array([_vector(c.gives) for c in listed], dtype=np.int64)
    cost = np.array([c.cost for c in listed], dtype=np.float64)
    found = _search(host, gives, cost, asked, tolerance)
    if found is None:
        return None
    members, bound = found
    return Cover(listed[members[0]].host, tuple(listed[i].key for i in members), float(cost[members].sum()), bound)


def _search(host: Ints, gives: Ints, cost: Floats, asked: Ints, tolerance: float) -> tuple[list[int], float] | None:
    bounds = lower_bounds(host, gives, cost, asked)
    order = [int(h) for h in np.argsort(bounds, kind="stable") if np.isfinite(bounds[h])]
    span = np.searchsorted(host, np.arange(len(asked) + 1))
    best: list[int] = []
    price = np.inf
    for h in order:
        if bounds[h] >= price * _SAME:
            break
        part = slice(span[h], span[h + 1])
        members = greedy(gives[part], cost[part], asked[h])
        if members is not None and cost[part][members].sum() < price * _SAME:
            best = [int(span[h]) + i for i in members]
            price = float(cost[best].sum())
    if not best:
        return None
    proven = price
    for h in order:
        if bounds[h] * (1 + tolerance) >= price * _SAME:
            # From here on no host has a cover that is cheaper by more than the tolerance.
            return best, min(proven, float(bounds[h]))
        part = slice(span[h], span[h + 1])
        better = cheapest(gives[part], cost[part], asked[h], price, tolerance)
        if better is None:
            continue
        proven = min(proven, better[1])
        if cost[part][better[0]].sum() < price * _SAME:
            best = [int(span[h]) + i for i in better[0]]
            price = float(cost[best].sum())
    return best, min(proven, price)


def _vector(resources: Resources) -> tuple[int, ...]:
    return tuple(getattr(resources, name) for name in COUNTED)
