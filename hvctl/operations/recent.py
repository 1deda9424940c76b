"""The last week of the node's record, kept in memory between the rounds of a daemon: a round reads the rows of the last
hour and not all of them again."""

from __future__ import annotations

from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.series import STEP, Series
from hvctl.operations.series import WEEK, history

OVERLAP: Final = 3600
"""Seconds before the newest row that are read again: a roll-up may be late."""
WHOLE: Final = 3600.0
"""Seconds after which everything is read again: an import may have brought rows of long ago, and a VM may be gone."""


class Recent:
    """One thread's own."""

    def __init__(self) -> None:
        self._kept: Series | None = None
        self._read_at = 0.0

    def series(self, engine: Engine) -> Series:
        """As operations.series.history gives the last week of all VMs, but that rows which were written later than an
        hour after their time may be missing for an hour."""
        now = engine.clock()
        kept = self._kept
        if kept is not None and 0 <= now - self._read_at < WHOLE:
            edge = int(now) // STEP * STEP
            newer = history(engine, seconds=edge - (kept.start + kept.slots * STEP) + OVERLAP)
            # A VM that is new here may have been measured before, and then imported.
            others = sorted({*newer.vms} - {*kept.vms})
            if others:
                kept = _joined(kept, history(engine, others), edge - round(WEEK))
            self._kept = _joined(kept, newer, edge - round(WEEK))
        else:
            self._kept, self._read_at = history(engine), now
        return self._kept


def _joined(old: Series, new: Series, start: int) -> Series:
    """From `start` to where `new` ends; where both have rows, the new ones count."""
    vms = tuple(sorted({*old.vms, *new.vms}))
    place = {vm: i for i, vm in enumerate(vms)}
    parts = [(part, np.array([place[vm] for vm in part.vms], np.int64)) for part in (old, new)]
    end = new.start + new.slots * STEP
    values = {r: np.full((len(vms), (end - start) // STEP), np.nan, np.float32) for r in old.values}
    for part, rows in parts:
        first, last = max(part.start, start), min(part.start + part.slots * STEP, end)
        here, there = (slice((first - s) // STEP, (last - s) // STEP) for s in (start, part.start))
        for resource, found in part.values.items():
            values[resource][rows, here] = found[:, there]

    # The largest size that was seen in that time, and the newest start.
    sizes = {r: np.full(len(vms), np.nan, np.float32) for r in old.sizes}
    starts = np.full(len(vms), np.nan)
    for part, rows in parts:
        for resource, size in sizes.items():
            size[rows] = np.fmax(size[rows], part.size(resource))
        if part.starts is not None:
            starts[rows] = np.fmax(starts[rows], part.starts)
    return Series(vms, start, values, sizes, starts)
