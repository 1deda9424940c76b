"""The node forecasts every VM anew, looks what came of what it forecast an hour ago, and learns from that who is to
answer: the model and the best rule are both asked each time, whoever answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.rounds import HORIZON, predictions
from hvctl.forecasting.series import STEP, Cases, Series, outcomes
from hvctl.model.forecast import Answerer
from hvctl.operations import model as models
from hvctl.operations.compare import AWAITED, learned
from hvctl.operations.forecast import panel_of

KEPT: Final = 86400.0
"""Seconds that forecasts are kept; what was worth learning of them stands in the standings."""
PATIENCE: Final = 30.0
"""Seconds that a model may take here: nobody waits, and the first round of many VMs loads LightGBM."""
_ALIVE: Final = 12  # slots within which something was measured of a VM that is forecast


def refresh(engine: Engine, series: Series) -> str:
    """What was done with the last week of the record. Repeated before there is a new five-minute row it changes
    nothing."""
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


def _look_back(engine: Engine, series: Series, now: int) -> int:
    """Write what came of forecasts whose hour is over; of how many."""
    host = engine.facts.name
    due = engine.store.forecasts.made(host, now - HORIZON - AWAITED, now - HORIZON, awaited=True)
    place = {vm: i for i, vm in enumerate(series.vms)}
    known = []
    for resource, group in groupby(sorted(due, key=lambda p: p.resource), key=lambda p: p.resource):
        # An hour that ends after the newest row is not over yet, as far as anybody can tell.
        ours = [p for p in group if p.vm_uuid in place and p.made_at >= series.start]
        if not ours or resource not in series.values:
            continue
        cut = np.array([(p.made_at - series.start) // STEP for p in ours])
        vm = np.array([place[p.vm_uuid] for p in ours])
        horizon = np.array([p.horizon // STEP for p in ours])
        came = zip(ours, *outcomes(series, resource, Cases(vm, cut, np.zeros_like(cut), horizon, cut)), strict=True)
        known += [p._replace(actual_peak=float(v), actual_mean=float(m)) for p, v, m in came if np.isfinite(v)]
    engine.store.forecasts.come(host, known)
    return len(known)
