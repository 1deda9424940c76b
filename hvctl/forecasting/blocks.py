"""Summaries of a series by half hours that end at the moment of the question: every feature and most rules read these
instead of a week of samples, so that a week costs as little as its 336 halves of an hour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.forecasting.series import F32, I64, Cases, Series

SLOTS: Final = 6
DAY: Final = 48
WEEK: Final = 7 * DAY
RECENT: Final = 12
_ROWS: Final = 256
_NAN: Final = np.float32(np.nan)


@dataclass(frozen=True, slots=True)
class Window:
    """What the questions of one chunk may see of one resource; rows are the chunk's.

    peaks and means: [rows, WEEK], the last one ends at the cut. recent: [rows, RECENT] samples up to the cut. size and
    restart: [rows], NaN where unknown.
    """

    rows: I64
    cases: Cases
    peaks: F32
    means: F32
    recent: F32
    size: F32
    restart: F32


def summarise(values: F32, phase: int) -> tuple[F32, F32]:
    """Peak and mean of each half hour, [vms, blocks], of which the first begins at slot `phase`; what is left over at
    the end is no block yet. NaN where nothing was measured."""
    count = max(0, (values.shape[1] - phase) // SLOTS)
    peaks, means = (np.empty((len(values), count), np.float32) for _ in range(2))
    # Some VMs at a time, so that the six passes find their samples in the cache.
    for at in range(0, len(values), _ROWS):
        parts = values[at : at + _ROWS, phase : phase + count * SLOTS].reshape(-1, count, SLOTS)
        peak = parts[..., 0].copy()
        total = np.nan_to_num(peak)
        known = np.isfinite(peak).astype(np.float32)
        for i in range(1, SLOTS):
            part = parts[..., i]
            np.fmax(peak, part, out=peak)
            there = np.isfinite(part)
            np.add(total, part, out=total, where=there)
            known += there
        peaks[at : at + _ROWS] = peak
        with np.errstate(invalid="ignore", divide="ignore"):
            means[at : at + _ROWS] = total / known
    return peaks, means


def windows(series: Series, resource: str, cases: Cases, chunk: int = 2048) -> Iterator[Window]:
    """The same summaries for many cuts: cuts that are whole half hours apart share them. What is older than the
    history that a case allows is NaN, as is what lies before the series."""
    values = series.values[resource]
    size, restart = series.size(resource), series.restart(resource)
    for phase in np.unique(cases.cut % SLOTS):
        chosen = np.flatnonzero(cases.cut % SLOTS == phase)
        last = int(cases.cut[chosen].max())
        first = max(0, (int(cases.cut[chosen].min()) - WEEK * SLOTS - phase) // SLOTS) * SLOTS + int(phase)
        peaks, means = (_padded(s, WEEK) for s in summarise(values[:, first : max(first, last)], 0))
        start = max(0, int(cases.cut[chosen].min()) - RECENT)
        seen = _padded(values[:, start:last], RECENT)
        for at in range(0, len(chosen), chunk):
            rows = chosen[at : at + chunk]
            part = cases.take(rows)
            block = np.maximum(part.cut - first, 0) // SLOTS
            yield _window(rows, part, peaks, means, seen, block, part.cut - start, size, restart)


def _padded(values: F32, left: int) -> F32:
    return np.concatenate([np.full((len(values), left), _NAN, np.float32), values], axis=1)


def _window(
    rows: I64, cases: Cases, peaks: F32, means: F32, seen: F32, block: I64, recent: I64, size: F32, restart: F32
) -> Window:
    view = np.lib.stride_tricks.sliding_window_view
    vm = cases.vm
    peak, mean = view(peaks, WEEK, axis=1)[vm, block], view(means, WEEK, axis=1)[vm, block]
    short = np.flatnonzero(cases.history < WEEK * SLOTS)
    if len(short):
        old = np.arange(WEEK) < WEEK - cases.history[short, None] // SLOTS
        for array in (peak, mean):
            array[short] = np.where(old, _NAN, array[short])
    last = view(seen, RECENT, axis=1)[vm, recent].copy()
    return Window(rows, cases, peak, mean, last, size[vm], restart[vm])


def hourly(peaks: F32) -> F32:
    """Peaks of the hours that end with each half hour (the first one has only itself)."""
    found = peaks.copy()
    np.fmax(peaks[:, 1:], peaks[:, :-1], out=found[:, 1:])
    return found
