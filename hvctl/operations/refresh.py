"""The node forecasts every VM anew, looks what came of what it forecast an hour ago, and learns from that who is to
answer: the model and the best rule are both asked each time, whoever answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.rounds import HORIZON, came, predictions
from hvctl.forecasting.series import STEP, Series
from hvctl.model.forecast import Answerer
from hvctl.operations import model as models
from hvctl.operations.compare import AWAITED, learn
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
    seen = _look_back(engine, series, made_at)
    compared = learn(engine, models.panel(engine.settings), made_at)
    measured = [np.isfinite(v[:, -_ALIVE:]).any(axis=1) for v in series.values.values()]
    alive = series.take(np.flatnonzero(np.any(measured, axis=0)))
    made = predictions(alive, replace(panel_of(engine, alive.vms), patience=PATIENCE), made_at)
    engine.store.forecasts.add(host, made)
    engine.store.forecasts.prune(host, made_at - KEPT)
    by_model = sum(p.answered == Answerer.MODEL for p in made)
    return (
        f"{len(alive.vms)} VMs forecast, {by_model} of {len(made)} answers by the model; {seen} outcomes seen, "
        f"{compared} compared"
    )


def _look_back(engine: Engine, series: Series, now: int) -> int:
    """Write what came of forecasts whose hour is over; of how many."""
    host = engine.facts.name
    due = engine.store.forecasts.made(host, now - HORIZON - AWAITED, now - HORIZON, awaited=True)
    known = came(series, due)
    engine.store.forecasts.come(host, known)
    return len(known)
