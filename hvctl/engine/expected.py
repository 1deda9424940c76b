"""What a VM is expected to need: from the node's newest forecasts, and after an interruption from earlier restarts.
What nobody forecasts, or has seen for less than an hour, is what the VM is promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from hvctl.decide.afterstart import HOUR, peaks
from hvctl.decide.needs import Known, expected_need, promised_need
from hvctl.engine.observe import balloon_of
from hvctl.model.forecast import Answerer
from hvctl.model.pool import Need
from hvctl.model.prediction import Prediction
from hvctl.model.restart import Restart
from hvctl.model.vm import Vm

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine

REMEMBERED: Final = 5.0
"""Seconds that forecasts which were read answer for: a decision asks for each VM of the host."""


def restarts_of(engine: Engine) -> list[Restart]:
    """What VMs of this host needed after their starts, of every span."""
    return engine.store.restarts.of(engine.facts.name)


def last_hour(engine: Engine, uuid: str, until: float) -> dict[str, float]:
    """The largest sample of each resource in the hour before `until`, in the units of forecasts."""
    samples = engine.store.samples.latest(engine.facts.name, int(until - HOUR), [uuid])
    return peaks([s for s in samples if s.at <= until])


def newest(engine: Engine) -> dict[str, dict[str, Prediction]]:
    """By VM and resource, as long as their hour is not over."""
    now = engine.clock()
    found: dict[str, dict[str, Prediction]] = {}
    for one in engine.store.forecasts.newest(engine.facts.name, now - 3600, now):
        if one.answered != Answerer.TOO_LITTLE_HISTORY:
            found.setdefault(one.vm_uuid, {})[one.resource] = one
    return found


class Expected:
    """Engine.needs: cpu, memory and network of the peak at the forecasts' quantile; IOPS are what is promised."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read_at = -math.inf
        self._known: Mapping[str, Mapping[str, Prediction]] = {}
        self._restarts: list[Restart] = []
        self._hours: dict[str, dict[str, float]] = {}

    def __call__(self, vm: Vm, gap: float) -> Need:
        """gap: seconds until it is back; 0: it runs on, and no restart is before it."""
        self._read()
        forecasts = self._known.get(vm.uuid, {})
        if not forecasts:
            return promised_need(vm, gap)
        anew = gap > 0 and bool(self._restarts)
        if anew and vm.uuid not in self._hours:
            self._hours[vm.uuid] = last_hour(self._engine, vm.uuid, self._engine.clock())
        return expected_need(
            vm,
            Known(
                forecasts,
                self._engine.settings.memory_margin,
                self._held_by_kernel(vm) if "memory" in forecasts else 0,
                self._restarts,
                self._hours[vm.uuid] if anew else {},
            ),
            gap,
        )

    def _read(self) -> None:
        now = self._engine.clock()
        if not 0 <= now - self._read_at < REMEMBERED:
            self._known, self._restarts, self._read_at = newest(self._engine), restarts_of(self._engine), now
            self._hours.clear()

    def _held_by_kernel(self, vm: Vm) -> int:
        if not (vm.state.active and vm.has_balloon):
            return 0
        balloon = balloon_of(self._engine.host, vm)
        return 0 if balloon.total is None else max(0, balloon.actual - balloon.total)
