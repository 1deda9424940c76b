"""Why a model says what it says of one VM: what each feature was worth in training, and what the answer would be if
that one feature were as it usually is for this VM. The best rule's answer stands beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hvctl.adapters.models.boosters import Boosters
from hvctl.forecasting.features import FEATURES, features
from hvctl.forecasting.forecast import forecast
from hvctl.forecasting.panel import key_of
from hvctl.forecasting.rulebook import LENGTHS
from hvctl.forecasting.series import F32, STEP, Cases
from hvctl.forecasting.spread import MEDIAN, UPPER
from hvctl.operations.forecast import Told

SHOWN: Final = 8
HOURS: Final = 72
SLOTS_OF_AN_HOUR: Final = 3600 // STEP
_SECONDS: Final = 5.0  # a person waits for this


@dataclass(frozen=True, slots=True)
class Feature:
    """value is the feature's (mostly the logarithm of a ratio to the VM's base; None: unknown), usual its median over
    the hours before, gain its share of what training gained, change what the forecast peak would gain if it were the
    usual one (in the resource's unit)."""

    name: str
    value: float | None
    usual: float | None
    gain: float
    change: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of the peak of one resource. model_peak is the model's own word, before any margin, at the nearest quantile that
    models are made for (None: it said nothing, and why says so); rule_peak is the best rule's at the quantile asked
    for, with its margin."""

    resource: str
    unit: str
    model_quantile: float
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
    nearest = min((MEDIAN, UPPER), key=lambda q: abs(q - asked.quantile))
    found = []
    for line in told.lines:
        rule = rules[line.resource]
        peak, moved, silence = _model(told, line.resource, nearest)
        why = line.reason if silence is None else f"{line.reason.rstrip('.')}; {silence}"
        found.append(
            Explanation(
                line.resource, line.unit, nearest, line.answered.value, why, rule.rule, rule.peak, peak, moved
            )
        )  # fmt: skip
    return found


def _model(told: Told, resource: str, quantile: float) -> tuple[float | None, tuple[Feature, ...], str | None]:
    """The model's word, the features that move it most, and why there is none."""
    models, asked = told.panel.models, told.question
    if not isinstance(models, Boosters):
        return None, (), None
    slots = told.series.slots
    cases = Cases.now(1, slots, round(asked.gap / STEP), round(asked.horizon / STEP), LENGTHS[-1])
    made = features(told.series, resource, cases)
    key = key_of(resource, "peak", quantile)
    usual = _usual(told, resource, cases)
    # One row as it is, and one for each feature with the usual value of that one.
    rows = np.repeat(made.x, 1 + len(FEATURES), axis=0)
    rows[np.arange(1, len(rows)), np.arange(len(FEATURES))] = usual
    word = models.predict(key, rows, _SECONDS)
    if not isinstance(word, np.ndarray):
        return None, (), word.reason
    peaks = made.value(word)
    gains = models.gains(key)
    moved = [
        Feature(
            name,
            _known(made.x[0, i]),
            _known(usual[i]),
            gains[name],
            float(peaks[1 + i] - peaks[0]),
        )
        for i, name in enumerate(FEATURES)
    ]
    moved.sort(key=lambda f: (-abs(f.change), -f.gain))
    return float(peaks[0]), tuple(moved[:SHOWN]), None


def _usual(told: Told, resource: str, now: Cases) -> F32:
    """The median of each feature over the hours before; NaN where none of them knew it."""
    cuts = np.arange(told.series.slots, SLOTS_OF_AN_HOUR, -SLOTS_OF_AN_HOUR)[1 : HOURS + 1]
    if not len(cuts):
        return np.full(len(FEATURES), np.nan, np.float32)
    same = (np.full(len(cuts), v[0], np.int64) for v in (now.gap, now.horizon, now.history))
    x = np.sort(features(told.series, resource, Cases(np.zeros(len(cuts), np.int64), cuts, *same)).x, axis=0)
    middle = np.maximum((np.isfinite(x).sum(axis=0) - 1) // 2, 0)
    found: F32 = x[middle, np.arange(len(FEATURES))]
    return found


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
