"""When a resource runs out, and with what probability: from the trend of what was measured lately, and from forecast
quantiles. The guest's word about itself can only make that look later and less likely.

The trend is Theil and Sen's: the median of all pairwise slopes, which a few outliers do not move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import median

from hvctl.model.guard import Measure, Outlook, Points

ENOUGH = 3
"""Points that make a trend."""
MOST = 12
"""Points that are looked at: so many cost little, and more tell little else."""
_MAD = 1.4826  # from the median of absolute deviations to a standard deviation
_UNSEEN = 0.05  # of the limit, where a forecast is no higher than what is used now


def outlook(
    measure: Measure,
    at: float,
    horizon: float,
    window: float,
    since: float | None,
    *,
    shift: float = 0.0,
    limit: float | None = None,
) -> Outlook | None:
    """None while nothing was seen, or nothing for half of the window: what is not known now runs out for nobody. since:
    what was measured before that is of another time (something was done).

    shift and limit ask what it would be if all levels were so much higher (lower: negative), under another limit."""
    if shift or limit is not None:
        measure = _changed(measure, shift, measure.limit if limit is None else limit)
    points = recent(measure.points, at - window, since)
    if not points or at - points[-1][0] > window / 2:
        return None
    found = _most_pressed(measure, points, horizon)
    claimed = recent(measure.claimed, at - window, since)
    if claimed:
        said = _most_pressed(measure, claimed, horizon)
        if said.contention < found.contention:
            return replace(said, by=f"{said.by}, in the guest's own words")
    return found


def _changed(measure: Measure, shift: float, limit: float) -> Measure:
    points, claimed = (tuple((t, v + shift) for t, v in p) for p in (measure.points, measure.claimed))
    quantiles = tuple((share, value + shift) for share, value in measure.quantiles)
    return replace(measure, points=points, claimed=claimed, quantiles=quantiles, limit=limit)


def recent(points: Points, first: float, since: float | None) -> Points:
    """Those that a decision looks at: none from before `first` or `since`, and of many a few from all over them."""
    floor = first if since is None else max(first, since)
    kept = [p for p in points if p[0] >= floor]
    if len(kept) <= MOST:
        return tuple(kept)
    return tuple(kept[round(i * (len(kept) - 1) / (MOST - 1))] for i in range(MOST))


def _most_pressed(measure: Measure, points: Points, horizon: float) -> Outlook:
    trend = _by_trend(measure, points, horizon)
    chance = _exceedance(measure.quantiles, trend.level, measure.limit)
    if chance * horizon / 2 <= trend.contention:
        return trend
    return Outlook(
        measure.resource, measure.unit, trend.level, measure.limit, trend.rate, trend.eta, chance, chance * horizon / 2,
        "forecast",
    )  # fmt: skip


def _by_trend(measure: Measure, points: Points, horizon: float) -> Outlook:
    level, limit = points[-1][1], measure.limit
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]

    def told(rate: float | None, eta: float | None, probability: float, by: str) -> Outlook:
        contention = 0.0 if eta is None else probability * max(0.0, horizon - eta)
        return Outlook(measure.resource, measure.unit, level, limit, rate, eta, probability, contention, by)

    rate = median(slopes) if len(points) >= ENOUGH and slopes else None
    if level >= limit:
        return told(rate, 0.0, 1.0, "it is exhausted")
    if rate is None:
        return told(None, None, 0.0, "too little was seen")
    probability = _beyond(points, rate, level, limit, horizon)
    return told(rate, (limit - level) / rate if rate > 0 else None, probability, "trend")


def _beyond(points: Sequence[tuple[float, float]], rate: float, level: float, limit: float, horizon: float) -> float:
    """The probability that the line, with the spread around it, is beyond the limit at the end of the horizon."""
    end = points[-1][0]
    start = median([v - rate * (t - end) for t, v in points])
    spread = _MAD * median([abs(v - rate * (t - end) - start) for t, v in points])
    span = end - points[0][0]
    # The variance of a regression line that far outside of evenly spaced points.
    sigma = spread * math.sqrt(1 / len(points) + 12 * horizon**2 / (len(points) * span**2))
    ahead = level + rate * horizon - limit
    if sigma <= 0:
        return 1.0 if ahead >= 0 else 0.0
    return 0.5 * (1 + math.erf(ahead / (sigma * math.sqrt(2))))


def _exceedance(quantiles: Sequence[tuple[float, float]], level: float, limit: float) -> float:
    """The probability that the peak passes the limit: linear between what is used now and the quantiles, and half as
    much with each further step as long as that to the last of them."""
    if not quantiles:
        return 0.0
    if level >= limit:
        return 1.0
    value, chance = level, 1.0
    for share, ahead in sorted(quantiles, key=lambda q: q[1]):
        further, less = max(ahead, value), min(chance, 1 - share)
        if limit <= further:
            return chance if further <= value else chance + (less - chance) * (limit - value) / (further - value)
        value, chance = further, less
    step = max(value - level, _UNSEEN * abs(limit), 1e-9)
    return float(chance * 0.5 ** ((limit - value) / step))
