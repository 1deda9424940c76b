"""What a VM is expected to need: its newest forecasts, after an interruption what earlier restarts took where that is
more, and what it is promised where nobody knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from hvctl.decide.restarts import need_after_restart
from hvctl.decide.victims import MIB
from hvctl.model.allocation import Resources, resources
from hvctl.model.pool import Need
from hvctl.model.prediction import Prediction
from hvctl.model.restart import Restart, RestartNeed
from hvctl.model.vm import Vm
from hvctl.units import format_time

MBIT: Final = 1_000_000
_COUNTED: Final = ("cpu", "memory", "network")


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one VM: its forecasts by resource, the record of restarts, and the peaks of its last hour, both
    only if it is to start anew. kernel is the bytes that its guest's kernel holds for itself, margin the bytes that are
    left to it beyond what it needs."""

    forecasts: Mapping[str, Prediction]
    margin: int
    kernel: int = 0
    restarts: Sequence[Restart] = ()
    hour: Mapping[str, float] = field(default_factory=dict)


def promised_need(vm: Vm, gap: float) -> Need:  # noqa: ARG001 - what stands here when nobody predicts
    """The answer while no forecast is wired: what the VM is promised now."""
    return Need(resources(vm.record.allocation if vm.record else vm.allocation), "promised: no forecast")


def of_span(record: Sequence[Restart], horizon: int) -> list[Restart]:
    """The restarts of the longest span that is not longer than the horizon, or else of the shortest."""
    spans = {r.span for r in record}
    chosen = max((s for s in spans if s <= horizon), default=min(spans, default=0))
    return [r for r in record if r.span == chosen]


def expected_need(vm: Vm, known: Known, gap: float) -> Need:
    """cpu, memory and network of the peak at the forecasts' quantile; IOPS are what is promised. gap: seconds until it
    is back; 0: it runs on, and no restart is before it."""
    promised = promised_need(vm, gap)
    found: dict[str, float] = {}
    words = []
    for resource in _COUNTED:
        one = known.forecasts.get(resource)
        if one is None:
            continue
        restart = _restart(vm, one, known) if gap > 0 else None
        found[resource] = one.peak
        word = f"{resource} by {one.rule}"
        if restart is not None and restart.value > one.peak:
            found[resource] = restart.value
            word = f"{resource} by {restart.rule}, from {restart.restarts} restarts of {restart.learned_from}"
        words.append(word)
    if not found:
        return promised
    made = next(iter(known.forecasts.values()))
    reason = f"forecast of {format_time(made.made_at)}, quantile {made.quantile:g}: {'; '.join(words)}"
    return Need(_resources(found, promised.resources, known), reason, known=True, peaks=found)


def _restart(vm: Vm, one: Prediction, known: Known) -> RestartNeed | None:
    """A restart's span is no longer than the forecast's, so the larger of both is needed."""
    if not known.restarts:
        return None
    image = vm.record.image if vm.record else None
    return need_after_restart(
        vm.uuid, image, of_span(known.restarts, one.horizon), one.resource,
        before=known.hour.get(one.resource), quantile=one.quantile, limit=_most(vm, one.resource),
    )  # fmt: skip


def _resources(found: Mapping[str, float], promised: Resources, known: Known) -> Resources:
    need = promised
    if "cpu" in found:
        need = replace(need, cpu=max(1, math.ceil(found["cpu"] * 100)))
    if "memory" in found:
        used = math.ceil(found["memory"]) * MIB
        # What the guest's kernel holds for itself is in no measurement of what is used of the rest.
        whole = used + known.kernel + known.margin
        need = replace(need, memory=min(whole, max(used, promised.memory)))
    if "network" in found and promised.network:
        # Both directions are measured together; a promise is of the larger one, and no limit holds nothing.
        need = replace(need, network=min(promised.network, math.ceil(found["network"] * MBIT)))
    return need


def _most(vm: Vm, resource: str) -> float | None:
    """What its machine can use at most; None where nobody knows."""
    return {"cpu": float(vm.max_vcpus), "memory": vm.max_memory / MIB}.get(resource)
