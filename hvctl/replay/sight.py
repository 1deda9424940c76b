"""What a node would know: what its VMs were served, and nothing of those that were away or of what is to come. From it
come the forecasts, and from what came of them the arbiter's record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from hvctl.forecasting.panel import Panel
from hvctl.forecasting.rounds import HORIZON, Lessons, came, predictions
from hvctl.forecasting.series import F32, F64, STEP, Flags, Series
from hvctl.model.forecast import Answerer
from hvctl.model.guard import Points
from hvctl.model.prediction import Prediction
from hvctl.replay.fleet import COUNTED, Fleet

WEEK: Final = 2016  # slots
_HOUR: Final = HORIZON // STEP


class Sight:
    """Demand that was cut off was not seen: of a VM that is kept too small a node sees what it got. observed: resource
    to [VMs, slots]; latest: to the newest sample of each VM, before the beginning the largest of an hour."""

    def __init__(self, fleet: Fleet, panel: Panel) -> None:
        self.fleet = fleet
        self.panel = panel
        self.observed: dict[str, F32] = {}
        self.latest: dict[str, F32] = {}
        for resource in COUNTED:
            seen = np.where(np.isfinite(fleet.series.values[resource]), fleet.demand[resource], np.float32(np.nan))
            seen[:, fleet.begin :] = np.nan
            self.observed[resource] = seen
            hour = seen[:, max(0, fleet.begin - _HOUR) : fleet.begin]
            self.latest[resource] = np.nan_to_num(np.fmax.reduce(hour, axis=1))
        self._made: list[list[Prediction]] = []
        self._lessons = Lessons(panel)

    def note(self, slot: int, served: Mapping[str, F64], there: Flags) -> None:
        """What was measured in a slot; there: [VMs], who ran."""
        for resource, values in self.observed.items():
            known = there & np.isfinite(self.fleet.series.values[resource][:, slot])
            values[known, slot] = served[resource][known]
            self.latest[resource][known] = served[resource][known]

    def points(self, number: int, resource: str, slot: int, window: float, since: float | None) -> Points:
        """What was measured of a VM in the `window` seconds before `slot`, each at the end of its five minutes, in the
        units of forecasts. since: nothing that began before that (None: all)."""
        start = self.fleet.series.start
        first = slot - int(window // STEP) - 1
        if since is not None:
            first = max(first, math.ceil((since - start) / STEP))
        first = max(0, first)
        values = self.observed[resource][number, first:slot].tolist()
        return tuple((float(start + (first + i + 1) * STEP), v) for i, v in enumerate(values) if math.isfinite(v))

    def forecasts(self, slot: int) -> dict[int, dict[str, Prediction]]:
        """By VM and resource, as of the beginning of `slot`, of those of whom an hour is known."""
        series = self._window(max(0, slot - WEEK), slot)
        self._learn(series)
        made = predictions(series, self.panel, series.start + series.slots * STEP)
        self._made.append(made)
        number = {vm: i for i, vm in enumerate(series.vms)}
        found: dict[int, dict[str, Prediction]] = {}
        for one in made:
            if one.answered != Answerer.TOO_LITTLE_HISTORY:
                found.setdefault(number[one.vm_uuid], {})[one.resource] = one
        return found

    def _window(self, first: int, slot: int) -> Series:
        whole = self.fleet.series
        values = {r: v[:, first:slot] for r, v in self.observed.items()}
        return Series(whole.vms, whole.start + first * STEP, values, whole.sizes)

    def _learn(self, series: Series) -> None:
        """From rounds whose hour is over, as the node does. series: what was seen until now."""
        now = series.start + series.slots * STEP
        learned = 0
        while self._made and (not self._made[0] or self._made[0][0].made_at + HORIZON <= now):
            learned += self._lessons.learn(came(series, self._made.pop(0)))
        if learned:
            margins = self._lessons.margins(self.fleet.series.vms)
            self.panel = replace(self.panel, standings=self._lessons.standings(), margins=margins)
