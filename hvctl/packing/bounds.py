"""What a cover costs at least, for all hosts at once, and what one costs at most, on one host.

At least: of one resource alone, with the last VM taken in part, the cheapest cover is by cost per unit (Dantzig's bound
of the knapsack problem); the largest such bound over the resources holds for all of them together. At most: greedy by
cost per share of what is still lacking, and then without what turned out to be needless (Chvatal's heuristic for
covering, with reverse deletion).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def lower_bounds(host: Ints, gives: Ints, cost: Floats, lacking: Ints) -> Floats:
    """Of each host, numbered as in `host`; infinite where all candidates together do not suffice. gives is (candidates,
    resources), lacking (hosts, resources)."""
    hosts = len(lacking)
    best = np.zeros(hosts)
    for resource in range(lacking.shape[1]):
        asked = lacking[:, resource].astype(np.float64)
        useful = np.flatnonzero(gives[:, resource] > 0)
        order = useful[np.lexsort((cost[useful] / gives[useful, resource], host[useful]))]
        where, amount = host[order], gives[order, resource].astype(np.float64)
        total = np.cumsum(amount)
        start = np.searchsorted(where, np.arange(hosts))
        before = np.concatenate(([0.0], total))[start]
        taken = np.clip((asked[where] - (total - amount - before[where])) / amount, 0.0, 1.0)
        bound = np.bincount(where, weights=taken * cost[order], minlength=hosts).astype(np.float64)
        there = np.bincount(where, weights=amount, minlength=hosts)
        bound[there < asked] = np.inf
        best = np.maximum(best, bound)
    return best


def greedy(gives: Ints, cost: Floats, lacking: Ints) -> list[int] | None:
    """Indices of a cover on one host that needs all of its members, ascending; None if there is no cover."""
    if (gives.sum(axis=0) < lacking).any():
        return None
    asked = lacking > 0
    scale = np.where(asked, lacking, 1).astype(np.float64)
    left = lacking.copy()
    price = cost.copy()
    chosen: list[int] = []
    while (left > 0).any():
        share = (np.minimum(gives, np.maximum(left, 0)) / scale)[:, asked].sum(axis=1)
        with np.errstate(divide="ignore"):
            pick = int(np.argmin(np.where(share > 0, price / share, np.inf)))
        chosen.append(pick)
        price[pick] = np.inf
        left -= gives[pick]
    return needed(gives, cost, lacking, chosen)


def needed(gives: Ints, cost: Floats, lacking: Ints, chosen: list[int]) -> list[int]:
    """The same cover without what it does not need, the dearest left out first."""
    kept = sorted(chosen)
    over = gives[kept].sum(axis=0) - lacking
    for one in sorted(kept, key=lambda i: (-cost[i], i)):
        if (over >= gives[one]).all():
            over -= gives[one]
            kept.remove(one)
    return kept
