"""Raw samples into five-minute ones, and which of both are old enough to go: arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from hvctl.model.sample import ROLLED, STORED

SLOT = 300
"""Seconds of one rolled-up row. It is named by its start, and holds the samples that ended in (start, start + SLOT]."""

Rolled = tuple[float | None, ...]
_SECONDS = 2 + STORED.index("seconds")
_LAST = tuple(2 + STORED.index(name) for name in ("vcpus", "memory"))
_MEASURES = tuple(2 + STORED.index(name) for name in ROLLED)


def slot(at: int) -> int:
    """The start of the slot that a sample which ended at `at` belongs to."""
    return (at - 1) // SLOT * SLOT


def last_full_slot(now: float) -> int:
    """The start of the last slot that is over."""
    return int(now) // SLOT * SLOT - SLOT


def roll_up(rows: Iterable[Sequence[float | None]]) -> Iterator[Rolled]:
    """Rows (at, vm, *STORED) into (slot, vm, *ROLLED_COLUMNS), in the order of slots and VMs."""
    groups: dict[tuple[int, int], list[Sequence[float | None]]] = {}
    for row in rows:
        at, vm = row[0], row[1]
        assert at is not None
        assert vm is not None
        groups.setdefault((slot(int(at)), int(vm)), []).append(row)
    for key in sorted(groups):
        group = sorted(groups[key], key=itemgetter(0))
        columns = list(zip(*group, strict=True))
        weights = columns[_SECONDS]
        rolled: list[float | None] = [*key, len(group), _tidy(sum(w for w in weights if w is not None))]
        rolled += [columns[i][-1] for i in _LAST]
        for i in _MEASURES:
            rolled += statistics(columns[i], weights)
        yield tuple(rolled)


def statistics(
    values: Sequence[float | None], weights: Sequence[float | None]
) -> tuple[float | None, float | None, float | None]:
    """Mean (weighted by the seconds that each value is of), max and 95th percentile of the values that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return None, None, None
    largest = max(known)
    if largest == 0:
        return 0, 0, 0
    total = summed = 0.0
    for value, weight in zip(values, weights, strict=True):
        if value is not None:
            weight = weight or 0.0
            total += weight
            summed += value * weight
    mean = summed / total if total else sum(known) / len(known)
    # Rounding must not lift a mean above the largest value.
    return min(_tidy(mean), largest), largest, _tidy(percentile(known, 0.95))


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the two nearest of the sorted values: numpy's default (Hyndman and Fan's 7)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _tidy(value: float) -> float:
    """Whole where fractions say nothing: a database stores small whole numbers in a quarter of the room."""
    return round(value) if value >= 100 else round(value, 4)


def cutoffs(now: float, raw_hours: float, rolled_days: float) -> tuple[int, int]:
    """Raw samples and rolled-up ones at or before these times are to go. Both end with a whole slot, so that no slot is
    ever rolled up from a part of it."""
    raw = int(now - raw_hours * 3600) // SLOT * SLOT
    return raw, int(now - rolled_days * 86400) // SLOT * SLOT
