"""The answer itself: quantiles of the peak and the mean demand after a gap, from the model where it has won, otherwise
from the best rule, and always with the word of who answered and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import numpy as np

from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.features import Features, features
from hvctl.forecasting.panel import Ask, Asked, Panel
from hvctl.forecasting.rulebook import LENGTHS
from hvctl.forecasting.rules import rules
from hvctl.forecasting.series import F32, I64, STEP, TARGETS, UNITS, Cases, Series
from hvctl.forecasting.spread import MEDIAN, UPPER, value
from hvctl.model.forecast import Answerer, Forecast

ENOUGH: Final = LENGTHS[0]  # slots: below an hour of history nothing is more than a guess
HORIZONS: Final = (1800, 3600)


@dataclass(frozen=True, slots=True)
class _Told:
    """What was answered about the peak or the mean: values by quantile, [vms] each, and the names of the rules."""

    values: Mapping[float, F32]
    answered: Answerer
    rules: Mapping[float, tuple[str, ...]]
    reason: str

    def by(self, vm: int, quantile: float, panel: Panel, history: int) -> tuple[Answerer, str]:
        """Who answered about one VM, and the name of the rule or model."""
        rule = self.rules[quantile][vm]
        if history < ENOUGH:
            return Answerer.TOO_LITTLE_HISTORY, rule
        return self.answered, panel.name or "model" if self.answered is Answerer.MODEL else rule


def forecast(
    series: Series,
    panel: Panel,
    *,
    resources: Sequence[str] | None = None,
    horizon: int = 3600,
    gap: int = 0,
    quantiles: Sequence[float] = (MEDIAN, UPPER),
) -> list[Forecast]:
    """For every VM of a series that ends now: one forecast for each resource and quantile, in that order. horizon is
    1800 or 3600 s, gap any number of seconds from 0, quantiles from 0.5 to 0.99. What is said of a quantile is the same
    whichever others are asked for; those of one VM never cross, a mean never exceeds its peak, and nothing exceeds the
    VM's size."""
    (found,) = forecasts(series, [panel], resources=resources, horizon=horizon, gap=gap, quantiles=quantiles)
    return found


def forecasts(
    series: Series,
    panels: Sequence[Panel],
    *,
    resources: Sequence[str] | None = None,
    horizon: int = 3600,
    gap: int = 0,
    quantiles: Sequence[float] = (MEDIAN, UPPER),
) -> list[list[Forecast]]:
    """What each of several panels answers; rules and features are computed once for all."""
    asks = [None if p.models is None else p.models.within(p.patience) for p in panels]
    found: list[list[list[Forecast]]] = [[[] for _ in series.vms] for _ in panels]
    cases = Cases.now(len(series.vms), series.slots, round(gap / STEP), round(horizon / STEP), LENGTHS[-1])
    for resource in resources or [r for r in series.values if r != "iops"]:
        said = {t: rules(series, resource, cases, peak=t == "peak") for t in TARGETS}
        history = seen(series, resource)
        made = cache(partial(features, series, resource, cases))
        for panel, ask, lines in zip(panels, asks, found, strict=True):
            told = {}
            for target in TARGETS:
                asked = Asked(panel, resource, target, said[target], series.size(resource), history)
                told[target] = _answer(asked, ask, made, sorted(quantiles))
            for vm, name in enumerate(series.vms):
                lines[vm] += [
                    _line(name, vm, resource, q, horizon, gap, int(history[vm]), panel, told) for q in sorted(quantiles)
                ]
    return [[line for lines in by_vm for line in lines] for by_vm in found]


def _line(
    name: str,
    vm: int,
    resource: str,
    quantile: float,
    horizon: int,
    gap: int,
    history: int,
    panel: Panel,
    told: Mapping[str, _Told],
) -> Forecast:
    peak, mean = told["peak"], told["mean"]
    answered, rule = peak.by(vm, quantile, panel, history)
    mean_answered, mean_rule = mean.by(vm, quantile, panel, history)
    few = answered is Answerer.TOO_LITTLE_HISTORY
    highest = float(peak.values[quantile][vm])
    return Forecast(
        vm=name,
        resource=resource,
        unit=UNITS[resource],
        quantile=quantile,
        horizon=horizon,
        gap=gap,
        peak=highest,
        mean=min(float(mean.values[quantile][vm]), highest),
        coverage=panel.coverage(answered, resource, quantile),
        answered=answered,
        rule=rule,
        mean_answered=mean_answered,
        mean_rule=mean_rule,
        history=history * STEP,
        reason=f"only {history * STEP // 60} minutes of it were seen" if few else peak.reason,
        model=panel.name,
        model_age=panel.age,
    )


def _answer(asked: Asked, ask: Ask | None, made: Callable[[], Features], quantiles: Sequence[float]) -> _Told:
    panel, resource, target = asked.panel, asked.resource, asked.target
    standing = panel.standings.get(f"{resource}-{target}", Standing())
    reason = panel.missing if ask is None else standing.reason
    model: F32 | None = None
    if ask is not None and standing.model:
        word = asked.model(UPPER, ask, made())
        if isinstance(word, str):
            reason = word
        else:
            model = word

    def values(by: Answerer, upper: F32, median: F32 | None) -> dict[float, F32]:
        low = upper if median is None else np.minimum(median, upper)
        at = {q: panel.spread(by, resource, target).at(q) for q in quantiles}
        return {
            q: np.fmin(value(low, upper, place, margin, asked.noise), asked.known.size)
            for q, (place, margin) in at.items()
        }

    # The median is asked for only where it decides anything, and never lifts the upper quantile.
    alone = set(quantiles) == {UPPER}
    low = None if alone else asked.rule(MEDIAN)
    found = values(Answerer.BASELINE, asked.rule(UPPER), low)
    if ask is not None and model is not None:
        median = low if alone else asked.model(MEDIAN, ask, made())
        # A set without a part for the median has the rule's, below its own upper quantile.
        ours = values(Answerer.MODEL, model, low if isinstance(median, str) else median)
        # A model has seen nothing either of a VM that nobody has watched for an hour.
        found = {q: np.where(asked.history < ENOUGH, found[q], ours[q]) for q in quantiles}
    names = {q: asked.rule_names(MEDIAN if q == MEDIAN else UPPER) for q in quantiles}
    return _Told(found, Answerer.BASELINE if model is None else Answerer.MODEL, names, reason)


def seen(series: Series, resource: str) -> I64:
    """[vms]: slots from the first sample of the last week to the end of the series; 0 without any."""
    known = np.isfinite(series.values[resource][:, -LENGTHS[-1] :])
    found: I64 = np.where(known.any(axis=1), known.shape[1] - known.argmax(axis=1), 0)
    return found
