"""The node forecasts every VM anew, looks what came of what it forecast an hour ago, and learns from that who is to
answer: the model and the best rule are both asked each time, whoever answers."""

from __future__ import annotations

from itertools import groupby
from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.forecast import Panel
from hvctl.forecasting.rounds import HORIZON, predictions, taught_by
from hvctl.forecasting.series import RESOURCES, STEP, Cases, Series, outcomes
from hvctl.model.forecast import Answerer
from hvctl.model.prediction import Recorded
from hvctl.operations.forecast import panel_of
from hvctl.operations.series import history

KEPT: Final = 86400.0
"""Seconds that forecasts are kept; what was worth learning of them stands in the standings."""
AWAITED: Final = 7200
"""Seconds that are waited for what came: a roll-up may be late, and a VM may be off."""
_ALIVE: Final = 12  # slots within which something was measured of a VM that is forecast


def refresh(engine: Engine) -> str:
    """What was done. Repeated before there is a new five-minute row it changes nothing."""
    series = history(engine)
    if not series.vms:
        return "nothing was measured yet"
    host, made_at = engine.facts.name, series.start + series.slots * STEP
    came = _look_back(engine, series, made_at)
    panel = panel_of(engine)
    learned = _learn(engine, panel, made_at)
    if learned:
        panel = panel_of(engine)
    measured = [np.isfinite(v[:, -_ALIVE:]).any(axis=1) for v in series.values.values()]
    alive = series.take(np.flatnonzero(np.any(measured, axis=0)))
    made = predictions(alive, panel, made_at)
    engine.store.forecasts.add(host, made)
    engine.store.forecasts.prune(host, made_at - KEPT)
    by_model = sum(p.answered == Answerer.MODEL for p in made)
    return (
        f"{len(alive.vms)} VMs forecast, {by_model} of {len(made)} answers by the model; {came} outcomes seen, "
        f"{learned} compared"
    )


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
        peaks, _ = outcomes(series, resource, Cases(vm, cut, np.zeros_like(cut), horizon, cut))
        known += [p._replace(actual_peak=float(v)) for p, v in zip(ours, peaks, strict=True) if np.isfinite(v)]
    engine.store.forecasts.come(host, known)
    return len(known)


def _learn(engine: Engine, panel: Panel, now: int) -> int:
    """Teach the arbiter; how many cases. Forecasts of hours that overlap are no independent witnesses, so of each
    resource one round an hour is learned from, once, and only what the model in use has said itself."""
    if panel.name is None:
        return 0
    host = engine.facts.name
    records = engine.store.forecasts.standings(host)
    found = engine.store.forecasts.made(host, now - HORIZON - AWAITED, now - HORIZON)
    taught: dict[str, Recorded] = {}
    number = 0
    for resource in RESOURCES:
        record = records.get(resource)
        if record is None or record.model_name != panel.name:
            record = Recorded(resource, panel.name, 0.0, 0.0, 0, 0, False, 0)
        rounds = [
            p
            for p in found
            if p.resource == resource and p.model == panel.name and None not in (p.actual_peak, p.model_peak)
        ]
        for made_at, group in groupby(rounds, key=lambda p: p.made_at):
            if made_at >= record.learned_at + HORIZON:
                cases = list(group)
                record = taught_by(record, cases, made_at)
                taught[resource] = record
                number += len(cases)
    if taught:
        engine.store.forecasts.stand(host, list(taught.values()))
    return number
