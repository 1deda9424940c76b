"""The node forecasts every VM anew, looks what came of what it forecast an hour ago, and learns from that who is to
answer: the model and the best rule are both asked each time, whoever answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.lessons import TARGETS, scales
from hvctl.forecasting.panel import Panel
from hvctl.forecasting.series import RESOURCES, STEP, Cases, Series, outcomes
from hvctl.forecasting.spread import UPPER
from hvctl.model.forecast import Answerer, Forecast
from hvctl.model.prediction import Prediction
from hvctl.operations import model as models
from hvctl.operations.compare import AWAITED, HORIZON, learned
from hvctl.operations.forecast import panel_of
from hvctl.operations.series import history

KEPT: Final = 86400.0
"""Seconds that forecasts are kept; what was worth learning of them stands in the standings."""
PATIENCE: Final = 30.0
"""Seconds that a model may take here: nobody waits, and the first round of many VMs loads LightGBM."""
_ALIVE: Final = 12  # slots within which something was measured of a VM that is forecast


def refresh(engine: Engine) -> str:
    """What was done. Repeated before there is a new five-minute row it changes nothing."""
    series = history(engine)
    if not series.vms:
        return "nothing was measured yet"
    host, made_at = engine.facts.name, series.start + series.slots * STEP
    came = _look_back(engine, series, made_at)
    compared = learned(engine, models.panel(engine.settings), made_at)
    measured = [np.isfinite(v[:, -_ALIVE:]).any(axis=1) for v in series.values.values()]
    alive = series.take(np.flatnonzero(np.any(measured, axis=0)))
    made = predictions(alive, replace(panel_of(engine, alive.vms), patience=PATIENCE), made_at)
    engine.store.forecasts.add(host, made)
    engine.store.forecasts.prune(host, made_at - KEPT)
    by_model = sum(p.answered == Answerer.MODEL for p in made)
    return (
        f"{len(alive.vms)} VMs forecast, {by_model} of {len(made)} answers by the model; {came} outcomes seen, "
        f"{compared} compared"
    )


def predictions(series: Series, panel: Panel, made_at: int) -> list[Prediction]:
    """One for each VM and resource of which anything was seen."""
    resources = [r for r in RESOURCES if r in series.values]
    if not len(series.vms):
        return []
    nobody = replace(panel, models=None, standings={}, missing=panel.missing or "not asked")
    rules = _asked(series, nobody, resources)
    # Everybody's word, whoever answers: as if the model had won everything.
    won = {f"{r}-{t}": Standing(model=True) for r in resources for t in TARGETS}
    ours = {} if panel.models is None else _asked(series, replace(panel, standings=won), resources)
    scale = {r: scales(series, r) for r in resources}
    found = []
    for i, vm in enumerate(series.vms):
        for resource in resources:
            rule = rules[vm, resource]
            if not rule.history:
                continue
            said = ours.get((vm, resource), rule)
            peak, mean = (
                said if by is Answerer.MODEL and panel.standings.get(f"{resource}-{t}", Standing()).model else rule
                for t, by in (("peak", said.answered), ("mean", said.mean_answered))
            )
            found.append(
                Prediction(
                    made_at, vm, resource, rule.horizon, rule.quantile, peak.peak, min(mean.mean, peak.peak), peak.rule,
                    peak.answered.value, panel.name, said.peak if said.answered is Answerer.MODEL else None, rule.peak,
                    float(scale[resource][i]), None, said.mean if said.mean_answered is Answerer.MODEL else None,
                    rule.mean,
                )
            )  # fmt: skip
    return found


def _asked(series: Series, panel: Panel, resources: Sequence[str]) -> Mapping[tuple[str, str], Forecast]:
    said = forecast(series, panel, resources=resources, horizon=HORIZON, quantiles=(UPPER,))
    return {(line.vm, line.resource): line for line in said}


def _look_back(engine: Engine, series: Series, now: int) -> int:
    """Write what came of forecasts whose hour is over; of how many."""
    host = engine.facts.name
    due = engine.store.forecasts.made(host, now - HORIZON - AWAITED, now - HORIZON)
    place = {vm: i for i, vm in enumerate(series.vms)}
    known = []
    for resource, group in groupby(sorted(due, key=lambda p: p.resource), key=lambda p: p.resource):
        # An hour that ends after the newest row is not over yet, as far as anybody can tell.
        ours = [p for p in group if p.actual_peak is None and p.vm_uuid in place and p.made_at >= series.start]
        if not ours or resource not in series.values:
            continue
        cut = np.array([(p.made_at - series.start) // STEP for p in ours])
        vm = np.array([place[p.vm_uuid] for p in ours])
        horizon = np.array([p.horizon // STEP for p in ours])
        came = zip(ours, *outcomes(series, resource, Cases(vm, cut, np.zeros_like(cut), horizon, cut)), strict=True)
        known += [p._replace(actual_peak=float(v), actual_mean=float(m)) for p, v, m in came if np.isfinite(v)]
    engine.store.forecasts.come(host, known)
    return len(known)
