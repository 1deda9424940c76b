"""The rules that need no training: about fifty cheap predictors, of which the best for each resource and length of
history answers until a model has proved better, and which are the opponents of every model.

Sources: Autopilot (EuroSys 2020) and Kubernetes' VPA for decayed percentiles, "Take it to the limit" (EuroSys 2021)
for N-sigma and its maximum with a percentile.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hvctl.forecasting.blocks import DAY, SLOTS, WEEK, Window, hourly, windows
from hvctl.forecasting.series import F32, Cases, Series

_SPANS: Final = {"30m": 1, "1h": 2, "2h": 4, "3h": 6, "6h": 12, "12h": 24, "24h": 48, "48h": 96, "72h": 144, "7d": WEEK}
_RAW: Final = {"6h": (72, (0.9,)), "24h": (288, (0.5, 0.9, 0.95, 0.99)), "7d": (2016, (0.9, 0.95, 0.99))}
_AIMS: Final = {"24h": (DAY, (0.5, 0.9, 0.95)), "7d": (WEEK, (0.5, 0.9, 0.95, 0.98))}
_DECAYED: Final = {"12h": 24, "24h": 48, "72h": 144}
_EWMA: Final = (0.3, 0.1, 0.03)


def rules(series: Series, resource: str, cases: Cases, *, peak: bool) -> dict[str, F32]:
    """Every rule's forecast for every case, without a margin. A rule whose past is missing falls back to the largest
    demand seen, then to 0, so that no forecast is NaN."""
    found: dict[str, F32] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for window in windows(series, resource, cases, 2048):
            for name, values in _chunk(series.values[resource], window, peak).items():
                found.setdefault(name, np.empty(len(cases), np.float32))[window.rows] = values
    return found


def _chunk(values: F32, window: Window, peak: bool) -> dict[str, F32]:
    raw = _history(values, window.cases)
    found = {"last": window.recent[:, -1], "mean_15m": _mean(window.recent[:, -3:]), "mean_1h": _mean(window.recent)}
    for name, span in _SPANS.items():
        found[f"max_{name}"] = np.fmax.reduce(window.peaks[:, WEEK - span :], axis=1)
    for name, (slots, levels) in _RAW.items():
        found |= _quantiles(name, raw[:, -slots:], levels)
    found |= _decayed(window.peaks)
    found |= _aimed(window, peak)
    found |= _sigmas(raw, found)
    found |= {
        "blend_max_1h_p95_24h": 0.5 * found["max_1h"] + 0.5 * found["p95_24h"],
        "blend_max_1h_max_24h": 0.5 * found["max_1h"] + 0.5 * found["max_24h"],
        "blend_max_1h_clock_max": 0.5 * found["max_1h"] + 0.5 * found["clock_max_7"],
        "blend_max_1h_aim_p90": 0.5 * found["max_1h"] + 0.5 * found["aim_p90_7d"],
        "blend_p95_24h_p95_7d": 0.5 * found["p95_24h"] + 0.5 * found["p95_7d"],
        "max_of_hour_and_clock": np.fmax(found["max_1h"], found["clock_1"]),
        "max_of_hour_and_median": np.fmax(found["max_1h"], found["aim_p50_7d"]),
    }
    largest = np.nan_to_num(found["max_7d"])
    return {name: np.where(np.isfinite(v), v, largest).astype(np.float32) for name, v in found.items()}


def _history(values: F32, cases: Cases) -> F32:
    """[rows, a week of samples] up to the cut, NaN where a case may not look."""
    slots = WEEK * SLOTS
    first = max(0, int(cases.cut.min()) - slots)
    before = slots - (int(cases.cut.min()) - first)
    part = values[:, first : int(cases.cut.max())]
    padded = np.concatenate([np.full((len(values), before), np.nan, np.float32), part], axis=1)
    view = np.lib.stride_tricks.sliding_window_view(padded, slots, axis=1)
    raw = view[cases.vm, cases.cut - first + before - slots]
    short = np.flatnonzero(cases.history < slots)
    raw[short] = np.where(np.arange(slots) < slots - cases.history[short, None], np.float32(np.nan), raw[short])
    return raw


def _mean(values: F32) -> F32:
    known = np.isfinite(values)
    mean: F32 = np.where(known, values, 0).sum(axis=1) / known.sum(axis=1).astype(np.float32)
    return mean


def _quantiles(name: str, values: F32, levels: tuple[float, ...], prefix: str = "p") -> dict[str, F32]:
    ordered = np.sort(values, axis=1)
    count = np.isfinite(ordered).sum(axis=1)
    at = np.maximum(np.ceil(np.outer(count, levels)).astype(np.int64) - 1, 0)
    taken = np.take_along_axis(ordered, at, axis=1)
    return {f"{prefix}{round(100 * q)}_{name}": taken[:, i] for i, q in enumerate(levels)}


def _decayed(peaks: F32) -> dict[str, F32]:
    """Percentiles of a histogram whose samples weigh half as much after each half-life."""
    order = np.argsort(peaks, axis=1)
    ordered = np.take_along_axis(peaks, order, axis=1)
    known = np.isfinite(ordered)
    found = {}
    for name, life in _DECAYED.items():
        weight = np.where(known, np.exp2((order - WEEK) / np.float32(life)), 0).astype(np.float32)
        share = np.cumsum(weight, axis=1)
        for level in (0.9, 0.95, 0.98):
            at = np.argmax(share >= level * share[:, -1:], axis=1)
            found[f"decayed_p{round(100 * level)}_{name}"] = np.take_along_axis(ordered, at[:, None], axis=1)[:, 0]
    return found


def _aimed(window: Window, peak: bool) -> dict[str, F32]:
    """From the history of what is asked for itself (the peak, or the mean, over one horizon)."""
    cases, long = window.cases, (window.cases.horizon > SLOTS)[:, None]
    if peak:
        aims = np.where(long, hourly(window.peaks), window.peaks)
    else:
        means = window.means.copy()
        means[:, 1:] = (window.means[:, 1:] + window.means[:, :-1]) / 2
        aims = np.where(long, means, window.means)
    found: dict[str, F32] = {"aim_last": aims[:, -1]}
    for name, (span, levels) in _AIMS.items():
        found |= _quantiles(name, aims[:, -span:], levels, "aim_p")
    ends = WEEK - 1 + (cases.gap + cases.horizon)[:, None] // SLOTS - DAY * np.arange(1, 8)
    seen = (ends >= 0) & (ends < WEEK)
    clock = np.where(seen, np.take_along_axis(aims, np.clip(ends, 0, WEEK - 1), axis=1), np.float32(np.nan))
    return found | {
        "clock_1": clock[:, 0],
        "clock_7": clock[:, 6],
        "clock_max_2": np.fmax(clock[:, 0], clock[:, 1]),
        "clock_max_7": np.fmax.reduce(clock, axis=1),
        "clock_mean_7": _mean(clock),
    }


def _sigmas(raw: F32, found: dict[str, F32]) -> dict[str, F32]:
    made: dict[str, F32] = {}
    for name, slots in (("24h", 288), ("7d", 2016)):
        part = raw[:, -slots:]
        mean = _mean(part)
        sd = np.sqrt(_mean((part - mean[:, None]) ** 2))
        for k in (2, 3, 5):
            made[f"mean_{k}sd_{name}"] = mean + k * sd
    made["limit_3sd_p95"] = np.fmax(made["mean_3sd_24h"], found["p95_7d"])
    made["limit_5sd_p99"] = np.fmax(made["mean_5sd_24h"], found["p99_7d"])
    part = raw[:, -288:]
    known = np.isfinite(part)
    filled, count = np.where(known, part, 0), known.astype(np.float32)
    for alpha in _EWMA:
        weight = ((1 - alpha) ** np.arange(287, -1, -1)).astype(np.float32)
        total = count @ weight
        mean = (filled @ weight) / total
        sd = np.sqrt(np.maximum((filled**2 @ weight) / total - mean**2, 0))
        made[f"ewma_{alpha}_2sd"], made[f"ewma_{alpha}_3sd"] = mean + 2 * sd, mean + 3 * sd
    return made
