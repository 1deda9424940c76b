"""The cheapest cover on one host as a mixed integer program, solved by HiGHS through scipy.optimize.milp; scipy has its
one door here."""

from __future__ import annotations

import numpy as np

from hvctl.packing.bounds import Floats, Ints, needed

# A limit in nodes, not in seconds: the same question has the same answer on every machine.
_NODES = 20_000
_SCALE = 1000.0


def cheapest(
    gives: Ints, cost: Floats, lacking: Ints, most: float, tolerance: float = 0.0
) -> tuple[list[int], float] | None:
    """Indices of the cheapest cover, ascending, and what every cover costs at least; None: none costs less than `most`,
    what a known cover costs. tolerance: how much dearer than the cheapest it may be, as a share.

    HiGHS takes a row for kept that lacks a millionth. Whether a cover is one is decided in whole numbers, and one that
    is none is cut off: whatever covers has a member outside of it."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    usable = np.flatnonzero((cost < most) & (np.minimum(gives, lacking) > 0).any(axis=1))
    asked = np.flatnonzero(lacking > 0)
    mine = gives[np.ix_(usable, asked)]
    if not len(usable) or (mine.sum(axis=0) < lacking[asked]).any():
        return None
    rows = (np.minimum(mine, lacking[asked]) / lacking[asked]).T
    floor = np.ones(len(asked))
    while True:
        found = milp(
            cost[usable] * (_SCALE / most),
            integrality=np.ones(len(usable)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(rows, floor, np.inf),
            options={"mip_rel_gap": tolerance, "node_limit": _NODES},
        )
        if found.x is None:
            return None
        chosen = found.x > 0.5
        if (mine[chosen].sum(axis=0) >= lacking[asked]).all():
            break
        if chosen.all():
            return None
        rows = np.vstack([rows, ~chosen])
        floor = np.append(floor, 1.0)
    bound = float(found.mip_dual_bound if found.mip_dual_bound is not None else found.fun) * (most / _SCALE)
    members = needed(gives, cost, lacking, [int(i) for i in usable[chosen]])
    return members, min(bound, float(cost[members].sum()))
