"""Any quantile from the two that are forecast, the median and the 0.95: those between them lie on the line through both
in log space, higher ones are the 0.95 with a margin, at places and with margins that were calibrated on past cases.
Both grow with the quantile, so that none ever cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from hvctl.forecasting.margin import LARGEST, quantile_of
from hvctl.forecasting.series import F32
from hvctl.model.forecast import Level

MEDIAN: Final = 0.5
UPPER: Final = 0.95
LOWEST: Final = MEDIAN
HIGHEST: Final = 0.99
LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)


def _normal(quantile: float) -> float:
    return NormalDist().inv_cdf(quantile)


@dataclass(frozen=True, slots=True)
class Spread:
    """Levels in the order of their quantiles: the median at place 0, the upper quantile at place 1, both without a
    margin."""

    levels: tuple[Level, ...]

    def at(self, quantile: float) -> tuple[float, float]:
        """Place and margin."""
        if quantile in (MEDIAN, UPPER):
            return (0.0 if quantile == MEDIAN else 1.0), 0.0
        known = [_normal(level.quantile) for level in self.levels]
        place, margin = (
            float(np.interp(_normal(quantile), known, values))
            for values in ([x.place for x in self.levels], [x.margin for x in self.levels])
        )
        return place, margin

    def coverage(self, quantile: float) -> float | None:
        """The share of cases that stayed below on VMs and days that nothing was tuned on; None: nobody knows."""
        known = [(level.quantile, level.coverage) for level in self.levels if level.coverage is not None]
        if not known or not known[0][0] <= quantile <= known[-1][0]:
            return None
        return float(np.interp(quantile, [q for q, _ in known], [c for _, c in known]))


# Where nothing was calibrated: as if the logarithm of demand were normal, and nobody knows the coverage.
NORMAL: Final = Spread(tuple(Level(q, _normal(q) / _normal(UPPER), 0.0, None) for q in LEVELS))


def value(median: F32, upper: F32, place: float, margin: float, floor: F32 | float) -> F32:
    """What a place and a margin say, never below 0. upper may not be below the median."""
    if margin == 0.0 and place in (0.0, 1.0):
        return median if place == 0.0 else upper
    low, high = np.log(median + floor), np.log(upper + floor)
    told = np.exp(low + np.float32(place) * (high - low) + np.float32(margin)) - floor
    # Rounding may not carry a value past the one that it ends at.
    return np.asarray(np.clip(told, median, upper) if place < 1 else np.maximum(told, upper), np.float32)


def calibrated(actual: F32, median: F32, upper: F32, floor: F32) -> Mapping[float, tuple[float, float]]:
    """The place and the margin of each quantile at which that share of these cases stays below."""
    low, high, came = (np.log(np.asarray(v, np.float64) + floor) for v in (np.minimum(median, upper), upper, actual))
    places = ((came - low) / np.maximum(high - low, 1e-6)).astype(np.float32)
    missing, ones = (came - high).astype(np.float32), np.ones_like(places)
    found = {MEDIAN: (0.0, 0.0), UPPER: (1.0, 0.0)}
    for q in LEVELS:
        if q > UPPER:
            found[q] = (1.0, float(np.clip(quantile_of(missing, ones, q), 0.0, LARGEST)))
        elif q not in found:
            found[q] = (float(np.clip(quantile_of(places, ones, q), 0.0, 1.0)), 0.0)
    return found


def spread(
    places: Mapping[float, tuple[float, float]], actual: F32, median: F32, upper: F32, floor: F32, size: F32
) -> Spread:
    """What was calibrated, with the coverage that it had on these cases, which it was not tuned on."""
    below = np.minimum(median, upper)
    levels = []
    for q, (place, margin) in sorted(places.items()):
        told = np.fmin(value(below, upper, place, margin, floor), size)
        levels.append(Level(q, place, margin, float((actual <= told).mean())))
    return Spread(tuple(levels))
