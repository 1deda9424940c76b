"""From a series to what models are taught: cases of many VMs, features, targets as ratios to each base, and what an
error costs. The parameters that every training uses stand here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.forecasting.features import features
from hvctl.forecasting.series import F32, FLOOR, I64, Cases, Series, outcomes
from hvctl.forecasting.spread import MEDIAN, UPPER

QUANTILES: Final = (MEDIAN, UPPER)
PRICING: Final = 0.5
GAPS: Final = (0, 6, 48)
HISTORIES: Final = (12, 72, 288, 2016)
LONGEST: Final = max(GAPS) + 12
PARAMETERS: Final[dict[str, float | int]] = {
    "trees": 150,
    "learning_rate": 0.06,
    "num_leaves": 31,
    "min_data_in_leaf": 800,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "max_bin": 127,
    "lambda_l2": 1.0,
}


def parameters(quantile: float, rows: int) -> dict[str, float | int]:
    """A median needs fewer trees; a small fleet smaller leaves."""
    found = dict(PARAMETERS)
    if quantile < 0.9:
        found["trees"] = 80
    found["min_data_in_leaf"] = int(min(found["min_data_in_leaf"], max(50, rows // 100)))
    return found


def drawn(vms: I64, first: int, last: int, number: int, seed: int = 1) -> Cases:
    """`number` cases, all of whose outcomes lie before slot `last`; horizons, gaps and histories at random."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(first + 12, last - LONGEST, number)
    return Cases(
        rng.choice(vms, number),
        cut,
        rng.choice(GAPS, number),
        rng.choice([6, 12], number, p=[0.35, 0.65]),
        rng.choice(HISTORIES, number),
    )


def scales(series: Series, resource: str) -> F32:
    """[vms]: what losses are divided by. The size where it is known (cores, memory), otherwise the largest demand in
    the series: only a unit of measurement, which no predictor sees."""
    largest = np.fmax.reduce(series.values[resource], axis=1, initial=np.float32(10 * FLOOR[resource]))
    size = series.size(resource)
    return np.where(np.isfinite(size), size, largest).astype(np.float32)


def measured(series: Series, resource: str, cases: Cases) -> Cases:
    """The cases that have an outcome, and at least one sample in the hour before the cut."""
    peak, _ = outcomes(series, resource, cases)
    view = np.lib.stride_tricks.sliding_window_view(series.values[resource], 12, axis=1)
    seen = np.isfinite(view[cases.vm, np.maximum(cases.cut - 12, 0)]).any(axis=1) & (cases.cut >= 12)
    return cases.take(np.isfinite(peak) & seen)


@dataclass(frozen=True, slots=True)
class Material:
    """One resource's rows. targets: "peak" and "mean" as ratios; weight: a base in units of the VM's scale."""

    x: F32
    targets: Mapping[str, F32]
    weight: F32
    vms: int


def material(series: Series, resource: str, cases: Cases) -> Material:
    cases = measured(series, resource, cases)
    made = features(series, resource, cases)
    peak, mean = outcomes(series, resource, cases)
    weight = (made.base + made.floor) / scales(series, resource)[cases.vm]
    ratios = {"peak": made.ratio(peak), "mean": made.ratio(mean)}
    return Material(made.x, ratios, weight, len(np.unique(cases.vm)))
