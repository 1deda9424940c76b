"""What the models see: ratios, as logarithms, of a VM's past to its own base, so that one model serves VMs of every
size. One code path for training and for serving; no feature reads a slot at or after the cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.forecasting.blocks import DAY, RECENT, SLOTS, WEEK, Window, hourly, windows
from hvctl.forecasting.series import F32, FLOOR, STEP, Cases, Series

_SPANS: Final = (4, 6, 12, 24, 48, 96, 144, WEEK)  # half hours of the windows whose maximum is taken
_MEANS: Final = (6, 12, 48, 144, WEEK)
_DAY_LEVELS: Final = (0.25, 0.5, 0.75, 0.9)
_WEEK_LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 0.98)
_HALF_LIVES: Final = (4, 16, 48, 144)
_DAYS: Final = (1, 2, 3, 4, 5, 6, 7)
_DECAY: Final[F32] = np.exp2(-np.arange(WEEK, 0, -1)[:, None] / np.array(_HALF_LIVES)).astype(np.float32)

FEATURES: Final[tuple[str, ...]] = (
    "horizon",
    "gap",
    "history",
    "size",
    "last",
    "mean_15m",
    "max_30m",
    "max_1h",
    "mean_1h",
    "min_1h",
    "spread_1h",
    "slope_1h",
    *(f"max_{s}" for s in _SPANS),
    *(f"mean_{s}" for s in _MEANS),
    *(f"day_q{q}" for q in _DAY_LEVELS),
    *(f"week_q{q}" for q in _WEEK_LEVELS),
    *(f"decayed_{h}" for h in _HALF_LIVES),
    "week_rank",
    "week_spread",
    "day_spread",
    "burstiness",
    "since_burst",
    "bursts_day",
    "bursts_week",
    *(f"clock_peak_{d}" for d in _DAYS),
    "clock_mean_1",
    "clock_mean_7",
    "clock_peak_max",
    "clock_peak_median",
    "clock_mean",
    "clock_near_max_1",
    "clock_near_max",
    "clock_mean_median",
    "clock_now",
    "clock_shift",
    "hour_sin",
    "hour_cos",
    "minute",
    "weekday",
    "since_start",
    "restart_peak",
)


def feature_hash() -> str:
    """Stored with every model: another list, or another order, is another model."""
    return hashlib.sha256("\n".join(FEATURES).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Features:
    """x: [rows, FEATURES]. base and floor: [rows], in the unit of the resource; a target y is learned, and predicted,
    as log((y + floor) / (base + floor))."""

    x: F32
    base: F32
    floor: F32

    def ratio(self, y: F32) -> F32:
        return np.asarray(np.log((y + self.floor) / (self.base + self.floor)), np.float32)

    def value(self, ratio: F32) -> F32:
        """The inverse of `ratio`, never below 0."""
        return np.asarray(np.maximum(np.exp(ratio) * (self.base + self.floor) - self.floor, 0), np.float32)


def features(series: Series, resource: str, cases: Cases) -> Features:
    """The features of every case, in its order."""
    x = np.empty((len(cases), len(FEATURES)), np.float32)
    base = np.empty(len(cases), np.float32)
    floor = np.empty(len(cases), np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for window in windows(series, resource, cases):
            x[window.rows], base[window.rows], floor[window.rows] = _chunk(series, resource, window)
    return Features(x, base, floor)


def base_of(window: Window, floor: float) -> tuple[F32, F32]:
    """Base and floor of each row: half the last hour's peak and half the 90th percentile of a day's half hours; where
    the last hour is a gap, the day alone, then the week. The floor is noise plus 1 % of the largest ever seen."""
    hour = np.fmax.reduce(window.recent, axis=1)
    day = _levels(np.sort(window.peaks[:, -DAY:], axis=1), (0.9,))[:, 0]
    most = np.fmax.reduce(window.peaks, axis=1)
    base = np.where(np.isfinite(hour), 0.5 * hour + 0.5 * np.where(np.isfinite(day), day, hour), day)
    base = np.where(np.isfinite(base), base, np.where(np.isfinite(most), most, 0))
    return base.astype(np.float32), (floor + 0.01 * np.nan_to_num(most)).astype(np.float32)


def _levels(ordered: F32, levels: tuple[float, ...]) -> F32:
    """Quantiles of rows that are sorted with their NaN last; NaN for an empty row."""
    count = np.isfinite(ordered).sum(axis=1)
    at = np.maximum(np.ceil(np.outer(count, levels)).astype(np.int64) - 1, 0)
    return np.take_along_axis(ordered, at, axis=1)


def _chunk(series: Series, resource: str, window: Window) -> tuple[F32, F32, F32]:
    base, floor = base_of(window, FLOOR[resource])
    scale = np.asarray(1 / (base + floor), np.float32)
    scaled = _Scaled(window, scale, np.asarray(floor * scale, np.float32))
    ratios: dict[str, F32] = {
        **_hour(scaled),
        **_spans(scaled),
        **_quantiles(scaled),
        **_clock(scaled),
        "size": window.size * scale,
        "restart_peak": window.restart * scale,
    }
    logs = np.log(np.maximum(np.stack(list(ratios.values()), axis=0), 0) + scaled.offset)
    found = dict(zip(ratios, logs, strict=True)) | _shape(scaled, ratios) | _time(series, window)
    return np.stack([found[name] for name in FEATURES], axis=1).astype(np.float32), base, floor


class _Scaled:
    """A window in units of base + floor. aims are the peaks over one horizon (an hour, or half of one)."""

    def __init__(self, window: Window, scale: F32, offset: F32) -> None:
        self.cases = window.cases
        self.offset = offset
        self.peaks = window.peaks * scale[:, None]
        self.means = window.means * scale[:, None]
        self.recent = window.recent * scale[:, None]
        self.long = (window.cases.horizon > SLOTS)[:, None]
        self.aims = np.where(self.long, hourly(self.peaks), self.peaks)
        self.number = np.isfinite(self.peaks).sum(axis=1).astype(np.float32)


def _mean(values: F32) -> F32:
    """Of each row without its gaps; NaN for a row of gaps."""
    known = np.isfinite(values)
    mean: F32 = np.where(known, values, 0).sum(axis=1) / known.sum(axis=1).astype(np.float32)
    return mean


def _hour(w: _Scaled) -> dict[str, F32]:
    mean = _mean(w.recent)
    return {
        "last": w.recent[:, -1],
        "mean_15m": _mean(w.recent[:, -3:]),
        "max_30m": w.peaks[:, -1],
        "max_1h": np.fmax.reduce(w.recent, axis=1),
        "mean_1h": mean,
        "min_1h": np.fmin.reduce(w.recent, axis=1),
        "spread_1h": np.sqrt(_mean(np.square(w.recent - mean[:, None]))),
        "first_half": _mean(w.recent[:, :6]),
        "second_half": _mean(w.recent[:, 6:]),
    }


def _spans(w: _Scaled) -> dict[str, F32]:
    """Maxima and means of windows that end at the cut, each from the one before it and what lies between them."""
    found: dict[str, F32] = {}
    edge, most = 0, np.full(len(w.number), np.nan, np.float32)
    for span in _SPANS:
        most = np.fmax(most, np.fmax.reduce(w.peaks[:, WEEK - span : WEEK - edge], axis=1))
        found[f"max_{span}"], edge = most, span
    known = np.isfinite(w.means)
    filled, count = np.where(known, w.means, 0), known.astype(np.float32)
    edge, total, number = 0, np.zeros_like(most), np.zeros_like(most)
    for span in _MEANS:
        total = total + filled[:, WEEK - span : WEEK - edge].sum(axis=1)
        number = number + count[:, WEEK - span : WEEK - edge].sum(axis=1)
        found[f"mean_{span}"], edge = total / number, span
    decayed = (np.where(np.isfinite(w.peaks), w.peaks, 0) @ _DECAY) / (np.isfinite(w.peaks).astype(np.float32) @ _DECAY)
    return found | {f"decayed_{h}": decayed[:, i] for i, h in enumerate(_HALF_LIVES)}


def _quantiles(w: _Scaled) -> dict[str, F32]:
    day = _levels(np.sort(w.aims[:, -DAY:], axis=1), _DAY_LEVELS)
    week = _levels(np.sort(w.aims, axis=1), _WEEK_LEVELS)
    found = {f"day_q{q}": day[:, i] for i, q in enumerate(_DAY_LEVELS)}
    return found | {f"week_q{q}": week[:, i] for i, q in enumerate(_WEEK_LEVELS)}


def _clock(w: _Scaled) -> dict[str, F32]:
    """What the same hours of the last seven days held: first the window that is asked about, then the hour that has
    just gone by, to compare with."""
    rows = np.arange(len(w.number))[:, None]
    # The block with which the window ends, on each earlier day; whole half hours, as gaps and horizons are.
    ends = WEEK - 1 + (w.cases.gap + w.cases.horizon)[:, None] // SLOTS - DAY * np.array(_DAYS)
    seen = (ends >= 0) & (ends < WEEK)
    at = np.clip(ends, 0, WEEK - 1)
    peak = np.where(seen, w.aims[rows, at], np.nan)
    before = np.maximum(at - 1, 0)
    mean = np.where(w.long, (w.means[rows, at] + w.means[rows, before]) / 2, w.means[rows, at])
    mean = np.where(seen, mean, np.float32(np.nan))
    near = [w.peaks[rows, np.clip(ends + i, 0, WEEK - 1)] for i in range(-3, 3)]
    wide = np.where(seen, np.fmax.reduce(np.stack(near), axis=0), np.nan)
    past = np.clip(WEEK - 1 - DAY * np.array(_DAYS[:-1]), 0, WEEK - 1)
    then: F32 = np.float32(0.5) * (w.means[:, past] + w.means[:, past - 1])
    return {
        **{f"clock_peak_{d}": peak[:, d - 1] for d in _DAYS},
        "clock_mean_1": mean[:, 0],
        "clock_mean_7": mean[:, 6],
        "clock_peak_max": np.fmax.reduce(peak, axis=1),
        "clock_peak_median": _median(peak),
        "clock_mean": _mean(mean),
        "clock_near_max_1": wide[:, 0],
        "clock_near_max": np.fmax.reduce(wide, axis=1),
        "clock_mean_median": _median(mean),
        "clock_now": _mean(then),
    }


def _median(values: F32) -> F32:
    return _levels(np.sort(values, axis=1), (0.5,))[:, 0]


def _shape(w: _Scaled, ratios: dict[str, F32]) -> dict[str, F32]:
    """How spread, how bursty, and where in its own week the VM is."""

    def step(high: str, low: str) -> F32:
        found: F32 = np.log((ratios[high] + w.offset) / (ratios[low] + w.offset))
        return found

    burst = w.peaks >= (0.5 * ratios[f"max_{WEEK}"])[:, None]
    day = np.isfinite(w.peaks[:, -DAY:]).sum(axis=1)
    return {
        "slope_1h": step("second_half", "first_half"),
        "week_rank": (w.aims < w.aims[:, -1:]).sum(axis=1) / w.number,
        "week_spread": step("week_q0.9", "week_q0.5"),
        "day_spread": step("day_q0.9", "day_q0.5"),
        "burstiness": step("max_48", "mean_48"),
        "clock_shift": step("mean_1h", "clock_now"),
        "since_burst": np.log1p(burst[:, ::-1].argmax(axis=1).astype(np.float32)),
        "bursts_day": burst[:, -DAY:].sum(axis=1) / np.maximum(day, 1),
        "bursts_week": burst.sum(axis=1) / w.number,
    }


def _time(series: Series, window: Window) -> dict[str, F32]:
    cases = window.cases
    aim = cases.cut + cases.gap + series.start // STEP
    turn = 2 * np.pi * (aim % 288) / 288
    starts = np.full(len(series.vms), np.nan) if series.starts is None else series.starts
    return {
        "horizon": cases.horizon.astype(np.float32),
        "gap": cases.gap.astype(np.float32),
        "history": np.log1p(np.isfinite(window.peaks).sum(axis=1)).astype(np.float32),
        "hour_sin": np.sin(turn).astype(np.float32),
        "hour_cos": np.cos(turn).astype(np.float32),
        "minute": (aim % RECENT).astype(np.float32),
        "weekday": (aim // 288 % 7).astype(np.float32),
        "since_start": np.log1p(np.maximum(series.start + cases.cut * STEP - starts[cases.vm], 0)).astype(np.float32),
    }
