"""Why a model says what it says of one VM: what each feature was worth in training, and what the answer would be if
nobody knew that one feature. The best rule's answer stands beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hvctl.adapters.boosters import Boosters
from hvctl.forecasting.features import FEATURES, features
from hvctl.forecasting.forecast import forecast, key_of
from hvctl.forecasting.rulebook import LENGTHS
from hvctl.forecasting.series import STEP, Cases
from hvctl.operations.forecast import Told

SHOWN: Final = 8
_SECONDS: Final = 5.0  # a person waits for this


@dataclass(frozen=True, slots=True)
class Feature:
    """value is the feature's (mostly the logarithm of a ratio to the VM's base; None: unknown), gain its share of what
    training gained, change what the forecast peak would gain without it (in the resource's unit)."""

    name: str
    value: float | None
    gain: float
    change: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of the peak of one resource. model_peak is the model's own word, before any margin (None: it said nothing, and
    why says so); rule_peak is the best rule's, with its margin."""

    resource: str
    unit: str
    answered: str
    why: str
    rule: str
    rule_peak: float
    model_peak: float | None
    features: tuple[Feature, ...] = ()


def explain(told: Told) -> list[Explanation]:
    asked = told.question
    without = replace(told.panel, models=None, standings={})
    plain = forecast(told.series, without, horizon=asked.horizon, gap=asked.gap, quantiles=(asked.quantile,))
    rules = {line.resource: line for line in plain}
    found = []
    for line in told.lines:
        rule = rules[line.resource]
        peak, moved, silence = _model(told, line.resource)
        why = line.reason if silence is None else f"{line.reason}; {silence}"
        found.append(Explanation(line.resource, line.unit, line.answered.value, why, rule.rule, rule.peak, peak, moved))
    return found


def _model(told: Told, resource: str) -> tuple[float | None, tuple[Feature, ...], str | None]:
    """The model's word, the features that move it most, and why there is none."""
    models, asked = told.panel.models, told.question
    if not isinstance(models, Boosters):
        return None, (), None
    slots = told.series.slots
    cases = Cases.now(1, slots, round(asked.gap / STEP), round(asked.horizon / STEP), LENGTHS[-1])
    made = features(told.series, resource, cases)
    key = key_of(resource, "peak", asked.quantile)
    # One row as it is, and one for each feature with that one unknown.
    rows = np.repeat(made.x, 1 + len(FEATURES), axis=0)
    rows[np.arange(1, len(rows)), np.arange(len(FEATURES))] = np.nan
    word = models.predict(key, rows, _SECONDS)
    if not isinstance(word, np.ndarray):
        return None, (), word.reason
    peaks = made.value(word)
    gains = models.gains(key)
    moved = [
        Feature(
            name,
            float(made.x[0, i]) if np.isfinite(made.x[0, i]) else None,
            gains[name],
            float(peaks[1 + i] - peaks[0]),
        )
        for i, name in enumerate(FEATURES)
    ]
    moved.sort(key=lambda f: (-abs(f.change), -f.gain))
    return float(peaks[0]), tuple(moved[:SHOWN]), None
