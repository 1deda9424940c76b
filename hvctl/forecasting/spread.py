"""Any quantile from the two that are forecast, the median and the 0.95: on the line between them in log space, and on
its continuation, at a place that was calibrated on past cases. Places grow with quantiles, so that none ever cross."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from hvctl.forecasting.margin import quantile_of
from hvctl.forecasting.series import F32
from hvctl.model.forecast import Level

MEDIAN: Final = 0.5
UPPER: Final = 0.95
LOWEST: Final = MEDIAN
HIGHEST: Final = 0.99
LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
_FARTHEST: Final = 3.0  # times the way from the median to the upper quantile


def _normal(quantile: float) -> float:
    return NormalDist().inv_cdf(quantile)


@dataclass(frozen=True, slots=True)
class Spread:
    """Levels in the order of their quantiles, the median at place 0 and the upper quantile at place 1."""

    levels: tuple[Level, ...]

    def place(self, quantile: float) -> float:
        if quantile in (MEDIAN, UPPER):
            return 0.0 if quantile == MEDIAN else 1.0
        at = [_normal(level.quantile) for level in self.levels]
        return float(np.interp(_normal(quantile), at, [level.place for level in self.levels]))

    def coverage(self, quantile: float) -> float | None:
        """The share of cases that stayed below on VMs and days that nothing was tuned on; None: nobody knows."""
        known = [(level.quantile, level.coverage) for level in self.levels if level.coverage is not None]
        if not known or not known[0][0] <= quantile <= known[-1][0]:
            return None
        return float(np.interp(quantile, [q for q, _ in known], [c for _, c in known]))


# Where nothing was calibrated: as if the logarithm of demand were normal, and nobody knows the coverage.
NORMAL: Final = Spread(tuple(Level(q, _normal(q) / _normal(UPPER), None) for q in LEVELS))


def between(median: F32, upper: F32, place: float, floor: F32 | float) -> F32:
    """The value at a place of the line from the median (0) to the upper quantile (1), both included; never below 0.
    upper may not be below the median."""
    if place in (0.0, 1.0):
        return median if place == 0.0 else upper
    low, high = np.log(median + floor), np.log(upper + floor)
    # Rounding may not carry a value past the one that it ends at.
    told = np.exp(low + np.float32(place) * (high - low)) - floor
    return np.asarray(np.clip(told, median, upper) if place < 1 else np.maximum(told, upper), np.float32)


def calibrated(actual: F32, median: F32, upper: F32, floor: F32) -> Mapping[float, float]:
    """The place of each quantile at which that share of these cases stays below."""
    low, high = (np.log(np.asarray(v, np.float64) + floor) for v in (np.minimum(median, upper), upper))
    way = np.maximum(high - low, 1e-6)
    needed = ((np.log(np.asarray(actual, np.float64) + floor) - low) / way).astype(np.float32)
    ones = np.ones_like(needed)
    found = {q: float(np.clip(quantile_of(needed, ones, q), 0.0, _FARTHEST)) for q in LEVELS}
    return {
        q: 0.0 if q == MEDIAN else 1.0 if q == UPPER else min(place, 1.0) if q < UPPER else max(place, 1.0)
        for q, place in found.items()
    }


def spread(places: Mapping[float, float], actual: F32, median: F32, upper: F32, floor: F32, size: F32) -> Spread:
    """Calibrated places with the coverage that they had on these cases, which they were not tuned on."""
    below = np.minimum(median, upper)
    covered = {q: actual <= np.fmin(between(below, upper, place, floor), size) for q, place in places.items()}
    return Spread(tuple(Level(q, place, float(covered[q].mean())) for q, place in sorted(places.items())))
