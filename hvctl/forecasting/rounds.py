"""One round of a node's forecasts: the model and the best rule are both asked about every VM, whoever answers, and what
came of it an hour later is what the arbiter learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from hvctl.forecasting.arbiter import Standing, learn
from hvctl.forecasting.forecast import Panel, forecast
from hvctl.forecasting.lessons import scales
from hvctl.forecasting.score import pinball
from hvctl.forecasting.series import RESOURCES, Series
from hvctl.model.forecast import Answerer, Forecast
from hvctl.model.prediction import Prediction, Recorded

QUANTILE: Final = 0.95
HORIZON: Final = 3600
"""Seconds."""


def predictions(series: Series, panel: Panel, made_at: int) -> list[Prediction]:
    """One for each VM and resource of which anything was seen."""
    resources = [r for r in RESOURCES if r in series.values]
    if not len(series.vms):
        return []
    rules = _asked(series, replace(panel, models=None, standings={}, missing=panel.missing or "not asked"), resources)
    # Everybody's word, whoever answers: as if the model had won everything.
    won = {f"{r}-peak": Standing(model=True) for r in resources}
    models = {} if panel.models is None else _asked(series, replace(panel, standings=won), resources)
    scale = {r: scales(series, r) for r in resources}
    found = []
    for i, vm in enumerate(series.vms):
        for resource in resources:
            rule = rules[vm, resource]
            if not rule.history:
                continue
            model = models.get((vm, resource))
            if model is not None and model.answered is not Answerer.MODEL:
                model = None
            standing = panel.standings.get(f"{resource}-peak", Standing())
            line = rule if model is None or not standing.model else model
            found.append(
                Prediction(
                    made_at, vm, resource, line.horizon, line.quantile, line.peak, line.mean, line.rule,
                    line.answered.value, panel.name, None if model is None else model.peak, rule.peak,
                    float(scale[resource][i]),
                )
            )  # fmt: skip
    return found


def _asked(series: Series, panel: Panel, resources: Sequence[str]) -> Mapping[tuple[str, str], Forecast]:
    said = forecast(series, panel, resources=resources, horizon=HORIZON, quantiles=(QUANTILE,))
    return {(line.vm, line.resource): line for line in said}


def taught_by(record: Recorded, cases: Sequence[Prediction], made_at: int) -> Recorded:
    """The record with one more round, of which it is known what came and what both had said."""
    actual, model, rule, scale = (
        np.array([getattr(p, n) for p in cases], np.float32)
        for n in ("actual_peak", "model_peak", "rule_peak", "scale")
    )
    before = Standing(record.model_loss, record.rule_loss, record.cases, record.vms, record.model)
    losses = [float(np.mean(pinball(actual, said, QUANTILE, scale), dtype=np.float64)) for said in (model, rule)]
    new = learn(before, losses[0], losses[1], len(cases), len(cases))
    return record._replace(
        model_loss=new.model_loss,
        rule_loss=new.rule_loss,
        cases=new.cases,
        vms=new.vms,
        model=new.model,
        learned_at=made_at,
    )
