"""The answer itself: quantiles of the peak and the mean demand after a gap, from the model where it has won, otherwise
from the best rule, and always with the word of who answered and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.features import Features, features
from hvctl.forecasting.margin import Known, OnlineMargin, capped
from hvctl.forecasting.rulebook import LENGTHS, Rulebook
from hvctl.forecasting.rules import rules
from hvctl.forecasting.series import F32, FLOOR, I64, STEP, UNITS, Cases, Series
from hvctl.model.forecast import Answerer, Forecast

ENOUGH: Final = LENGTHS[0]  # slots: below an hour of history nothing is more than a guess
PATIENCE: Final = 0.1  # seconds that a model may take for one VM ...
PATIENCE_PER_VM: Final = 0.001  # ... and for each further one
HORIZONS: Final = (1800, 3600)


class Models(Protocol):
    """What the boosters are to this module: the logarithmic ratio of each row, or something else for no answer (it has
    a `reason`)."""

    def predict(self, key: str, x: F32, seconds: float) -> F32 | Silent: ...


class Silent(Protocol):
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Panel:
    """Everybody who may answer. models: None with missing telling why there are none. standings: by key without the
    quantile ("cpu-peak"); nobody's standing lets the rule answer. margins: by full key; shifts likewise, logarithmic.
    coverages: by full key, what the record says."""

    book: Rulebook = field(default_factory=lambda: Rulebook({}))
    models: Models | None = None
    missing: str = "there is no model"
    name: str | None = None
    age: float | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)
    margins: Mapping[str, OnlineMargin] = field(default_factory=dict)
    shifts: Mapping[str, float] = field(default_factory=dict)
    coverages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Told:
    value: F32
    answered: Answerer
    rules: tuple[str, ...]
    reason: str


def key_of(resource: str, target: str, quantile: float) -> str:
    """target: peak or mean."""
    return f"{resource}-{target}-{quantile:g}"


def forecast(
    series: Series,
    panel: Panel,
    *,
    resources: Sequence[str] | None = None,
    horizon: int = 3600,
    gap: int = 0,
    quantiles: Sequence[float] = (0.5, 0.95),
) -> list[Forecast]:
    """For every VM of a series that ends now: one forecast for each resource and quantile, in that order. horizon is
    1800 or 3600 s, gap any number of seconds from 0. The quantiles of one VM never cross, a mean never exceeds its
    peak, and nothing exceeds the VM's size."""
    found: list[list[Forecast]] = [[] for _ in series.vms]
    for resource in resources or [r for r in series.values if r != "iops"]:
        for vm, lines in enumerate(_resource(series, panel, resource, horizon, gap, sorted(quantiles))):
            found[vm] += lines
    return [line for lines in found for line in lines]


def _resource(
    series: Series, panel: Panel, resource: str, horizon: int, gap: int, quantiles: Sequence[float]
) -> list[list[Forecast]]:
    cases = Cases.now(len(series.vms), series.slots, round(gap / STEP), round(horizon / STEP), LENGTHS[-1])
    history = seen(series, resource)
    made: Features | None = None
    told: dict[tuple[str, float], _Told] = {}
    for target in ("peak", "mean"):
        said = rules(series, resource, cases, peak=target == "peak")
        known = Known(series.size(resource), said["max_7d"])
        lowest = np.zeros(len(series.vms), np.float32)
        for quantile in quantiles:
            key = key_of(resource, target, quantile)
            standing = panel.standings.get(f"{resource}-{target}", Standing())
            answer: F32 | None = None
            reason = panel.missing if panel.models is None else standing.reason
            if panel.models is not None and standing.model:
                made = features(series, resource, cases) if made is None else made
                patience = PATIENCE + PATIENCE_PER_VM * (len(series.vms) - 1)
                word = panel.models.predict(key, made.x, patience)
                if isinstance(word, np.ndarray):
                    answer = _with_margin(panel, key, made, word, known)
                else:
                    reason = word.reason
            base = panel.book.answer(key, said, history, known, FLOOR[resource])
            # A model has seen nothing either of a VM that nobody has watched for an hour.
            value = base if answer is None else np.where(history < ENOUGH, base, answer)
            value = np.maximum(value, lowest)
            lowest = value
            by = Answerer.BASELINE if answer is None else Answerer.MODEL
            names = tuple(panel.book.of(key, int(h)).rule for h in history)
            told[target, quantile] = _Told(value, by, names, reason)
    return [
        [_line(series, panel, resource, vm, q, horizon, gap, int(history[vm]), told) for q in quantiles]
        for vm in range(len(series.vms))
    ]


def _with_margin(panel: Panel, key: str, made: Features, word: F32, known: Known) -> F32:
    value = made.value(word)
    margin = panel.margins.get(key)
    if margin is not None:
        return margin.apply(np.arange(len(value)), value, made.floor, known.size)
    return capped((value + made.floor) * np.float32(np.exp(panel.shifts.get(key, 0.0))) - made.floor, known.size)


def seen(series: Series, resource: str) -> I64:
    """[vms]: slots from the first sample of the last week to the end of the series; 0 without any."""
    known = np.isfinite(series.values[resource][:, -LENGTHS[-1] :])
    found: I64 = np.where(known.any(axis=1), known.shape[1] - known.argmax(axis=1), 0)
    return found


def _line(
    series: Series,
    panel: Panel,
    resource: str,
    vm: int,
    quantile: float,
    horizon: int,
    gap: int,
    history: int,
    told: Mapping[tuple[str, float], _Told],
) -> Forecast:
    peak, mean = told["peak", quantile], told["mean", quantile]
    highest = float(peak.value[vm])
    answered, reason = peak.answered, peak.reason
    if history < ENOUGH:
        answered, reason = Answerer.TOO_LITTLE_HISTORY, f"only {history * STEP // 60} minutes of it were seen"
    by_model = answered is Answerer.MODEL
    return Forecast(
        vm=series.vms[vm],
        resource=resource,
        unit=UNITS[resource],
        quantile=quantile,
        horizon=horizon,
        gap=gap,
        peak=highest,
        mean=min(float(mean.value[vm]), highest),
        coverage=panel.coverages.get(key_of(resource, "peak", quantile)),
        answered=answered,
        rule=panel.name or "model" if by_model else peak.rules[vm],
        history=history * STEP,
        reason=reason,
        model=panel.name,
        model_age=panel.age,
    )
