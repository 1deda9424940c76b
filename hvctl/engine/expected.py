"""What a VM is expected to need: from the node's newest forecasts, and after an interruption from earlier restarts.
What nobody forecasts, or has seen for less than an hour, is what the VM is promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hvctl.decide.afterstart import HOUR, peaks
from hvctl.decide.restarts import need_after_restart
from hvctl.engine.handover import promised_need
from hvctl.model.allocation import Resources
from hvctl.model.forecast import Answerer
from hvctl.model.pool import Need
from hvctl.model.prediction import Prediction
from hvctl.model.restart import Restart, RestartNeed
from hvctl.model.vm import Vm
from hvctl.units import format_time

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine

REMEMBERED: Final = 5.0
"""Seconds that forecasts which were read answer for: a decision asks for each VM of the host."""
MIB: Final = 1 << 20
MBIT: Final = 1_000_000
_COUNTED: Final = ("cpu", "memory", "network")


def restarts_of(engine: Engine) -> list[Restart]:
    """What VMs of this host needed after their starts, of every span."""
    return engine.store.restarts.of(engine.facts.name)


def of_span(record: list[Restart], horizon: int) -> list[Restart]:
    """The restarts of the longest span that is not longer than the horizon, or else of the shortest."""
    spans = {r.span for r in record}
    chosen = max((s for s in spans if s <= horizon), default=min(spans, default=0))
    return [r for r in record if r.span == chosen]


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
        promised = promised_need(vm, gap)
        rolling = self._known.get(vm.uuid, {})
        found: dict[str, float] = {}
        words = []
        for resource in _COUNTED:
            one = rolling.get(resource)
            if one is None:
                continue
            restart = self._restart(vm, one, gap)
            found[resource] = one.peak
            word = f"{resource} by {one.rule}"
            if restart is not None and restart.value > one.peak:
                found[resource] = restart.value
                word = f"{resource} by {restart.rule}, from {restart.restarts} restarts of {restart.learned_from}"
            words.append(word)
        if not found:
            return promised
        made = next(iter(rolling.values()))
        reason = f"forecast of {format_time(made.made_at)}, quantile {made.quantile:g}: {'; '.join(words)}"
        return Need(self._resources(vm, found, promised.resources), reason, known=True, peaks=found)

    def _read(self) -> None:
        now = self._engine.clock()
        if not 0 <= now - self._read_at < REMEMBERED:
            self._known, self._restarts, self._read_at = newest(self._engine), restarts_of(self._engine), now
            self._hours.clear()

    def _restart(self, vm: Vm, one: Prediction, gap: float) -> RestartNeed | None:
        """A restart's span is no longer than the forecast's, so the larger of both is needed."""
        if gap <= 0 or not self._restarts:
            return None
        if vm.uuid not in self._hours:
            self._hours[vm.uuid] = last_hour(self._engine, vm.uuid, self._engine.clock())
        image = vm.record.image if vm.record else None
        return need_after_restart(
            vm.uuid, image, of_span(self._restarts, one.horizon), one.resource,
            before=self._hours[vm.uuid].get(one.resource), quantile=one.quantile, limit=_most(vm, one.resource),
        )  # fmt: skip

    def _resources(self, vm: Vm, found: Mapping[str, float], promised: Resources) -> Resources:
        need = promised
        if "cpu" in found:
            need = replace(need, cpu=max(1, math.ceil(found["cpu"] * 100)))
        if "memory" in found:
            used = math.ceil(found["memory"]) * MIB
            # What the guest's kernel holds for itself is in no measurement of what is used of the rest.
            whole = used + self._held_by_kernel(vm) + self._engine.settings.memory_margin
            need = replace(need, memory=min(whole, max(used, promised.memory)))
        if "network" in found and promised.network:
            # Both directions are measured together; a promise is of the larger one, and no limit holds nothing.
            need = replace(need, network=min(promised.network, math.ceil(found["network"] * MBIT)))
        return need

    def _held_by_kernel(self, vm: Vm) -> int:
        if not (vm.state.active and vm.has_balloon):
            return 0
        balloon = self._engine.host.domains.balloon(vm.uuid)
        return 0 if balloon.total is None else max(0, balloon.actual - balloon.total)


def _most(vm: Vm, resource: str) -> float | None:
    """What its machine can use at most; None where nobody knows."""
    return {"cpu": float(vm.max_vcpus), "memory": vm.max_memory / MIB}.get(resource)
