"""Judges models against the best rules on a part of a series that neither has seen: the figures on every card, and the
condition of every promotion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hvctl.errors import UsageError
from hvctl.forecasting.features import Features, features
from hvctl.forecasting.lessons import GAPS, HISTORIES, LONGEST, measured, scales
from hvctl.forecasting.margin import FLEET_RATE, RATE, Known, OnlineMargin, capped, follow, quantile_of
from hvctl.forecasting.panel import Models, key_of, voice
from hvctl.forecasting.rulebook import Choice, Rulebook, best, composite
from hvctl.forecasting.rules import rules
from hvctl.forecasting.score import gain_interval, pinball
from hvctl.forecasting.series import F32, FLOOR, I64, Cases, Series, outcomes
from hvctl.forecasting.spread import MEDIAN, calibrated, spread
from hvctl.model.forecast import Answerer, Level, Metric

QUANTILE: Final = 0.95
# How fast margins follow (a VM's own, the fleet's): what may be chosen on the calibration part. A model's margin always
# follows the fleet, which is what keeps its stated coverage; a rule's does where that lowers its loss.
MODEL_RATES: Final = tuple((rate, FLEET_RATE) for rate in (0.0, 0.01, 0.02, 0.05, 0.1))
RULE_RATES: Final = (*((rate, 0.0) for rate in (0.0, 0.01, 0.02, 0.05, 0.1)), *MODEL_RATES)
DAY: Final = 288
PATIENCE: Final = 600.0  # seconds: nobody waits for a trial


@dataclass(frozen=True, slots=True)
class Split:
    """VMs (indexes) and slots: training up to `train_end`, calibration up to `calibration_end`, then the test."""

    train: I64
    calibration: I64
    test: I64
    train_end: int
    calibration_end: int
    end: int


def split(series: Series, vms: tuple[float, float, float], days: tuple[float, float]) -> Split:
    """Shares in percent of VMs for training, calibration and test, and of the time at which training and calibration
    end. VMs are drawn by a hash of their names, so that a new one moves no other. UsageError if a part is empty."""
    place = np.array([int(hashlib.sha256(v.encode()).hexdigest()[:8], 16) / 2**32 for v in series.vms]) * 100
    first, second = (round(series.slots * share / 100) for share in days)
    if series.slots > 10 * DAY:
        first, second = first // DAY * DAY, second // DAY * DAY
    a, b, c = vms
    found = Split(
        np.flatnonzero(place < a),
        np.flatnonzero((place >= a) & (place < a + b)),
        np.flatnonzero((place >= a + b) & (place < a + b + c)),
        first,
        second,
        series.slots,
    )
    shortest = LONGEST + 12
    if not len(found.calibration) or not len(found.test) or min(second - first, series.slots - second) <= shortest:
        raise UsageError(
            f"{len(series.vms)} VMs over {series.slots / DAY:.1f} days are too few to judge a model on what it has not "
            "seen.",
            "give it more VMs or more days",
        )
    return found


def hourly(vms: I64, first: int, last: int, horizon: int, seed: int, every: int = 12) -> Cases:
    """One case for each VM and `every` slots, at a random one of them, with a random gap and history, in the order of
    time; all outcomes end before `last`."""
    rng = np.random.default_rng(seed)
    steps = np.arange(first, last - LONGEST - every, every)
    cut = np.repeat(steps, len(vms)) + rng.integers(0, every, len(steps) * len(vms))
    gaps, histories = rng.choice(GAPS, len(cut)), rng.choice(HISTORIES, len(cut))
    return Cases(np.tile(vms, len(steps)), cut, gaps, np.full(len(cut), horizon), histories)


@dataclass(frozen=True, slots=True)
class Part:
    """Cases of one resource and target with everything that anybody says about them."""

    cases: Cases
    actual: F32
    scale: F32
    known: Known
    made: Features
    rules: Mapping[str, F32]

    def take(self, rows: Any) -> Part:
        made = Features(self.made.x[rows], self.made.base[rows], self.made.floor[rows])
        found = {n: v[rows] for n, v in self.rules.items()}
        return Part(self.cases.take(rows), self.actual[rows], self.scale[rows], self.known.take(rows), made, found)


def part(series: Series, resource: str, cases: Cases, *, peak: bool) -> Part:
    cases = measured(series, resource, cases)
    actual = outcomes(series, resource, cases)[0 if peak else 1]
    found = rules(series, resource, cases, peak=peak)
    seen = Known(series.size(resource)[cases.vm], found["max_7d"])
    made = features(series, resource, cases)
    return Part(cases, actual, scales(series, resource)[cases.vm], seen, made, found)


def raw(models: Models, key: str, p: Part) -> F32:
    """The model's own quantile, without any margin; UsageError if the model does not answer."""
    said = models.within(PATIENCE)(key, p.made.x)
    if not isinstance(said, np.ndarray):
        raise UsageError(f"the model cannot be judged: {said.reason}.", "hvctl model list")
    return capped(p.made.value(said), p.known.size)


def shifted(models: Models, key: str, p: Part, shift: float) -> F32:
    """With the margin of the calibration alone."""
    return capped((raw(models, key, p) + p.made.floor) * np.float32(np.exp(shift)) - p.made.floor, p.known.size)


def shift_of(p: Part, forecast: F32, quantile: float) -> float:
    """By how much (logarithm) the calibration part is missed; never less than 0."""
    missing = np.log((p.actual + p.made.floor) / (forecast + p.made.floor))
    return max(0.0, quantile_of(missing, np.ones_like(missing), quantile))


def online(p: Part, forecast: F32, vms: int, shift: float, rates: tuple[float, float] = (RATE, FLEET_RATE)) -> F32:
    """The forecasts with the margin of each VM's own past, and the fleet's."""
    ends = p.cases.cut + p.cases.gap + p.cases.horizon
    margin = OnlineMargin(vms, QUANTILE, shift, *rates)
    return follow(margin, p.cases.vm, p.cases.cut, ends, forecast, p.actual, p.made.floor, p.known.size)


def best_rates(
    p: Part, forecast: F32, vms: int, shift: float, choices: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """The rates at which online margins lower the loss most on the calibration part."""

    def loss(rates: tuple[float, float]) -> float:
        return float(pinball(p.actual, online(p, forecast, vms, shift, rates), QUANTILE, p.scale).mean())

    return min(choices, key=loss)


def spread_of(
    c: Part, t: Part, median: Callable[[Part], F32], upper: Callable[[Part], F32], told: F32
) -> tuple[Level, ...]:
    """The other quantiles of one answerer: placed on the calibration part, with the coverage of the test part. told is
    the upper quantile of the test part with its online margins."""
    places = calibrated(c.actual, median(c), upper(c), c.made.floor)
    return spread(places, t.actual, median(t), told, t.made.floor, t.known.size).levels


@dataclass(frozen=True, slots=True)
class Trial:
    """choices: by full key; spreads: by answerer, resource and target; rates: of the model's online margins."""

    metric: Metric
    choices: Mapping[str, Mapping[int, Choice]]
    shift: float
    spreads: Mapping[str, tuple[Level, ...]]
    rates: tuple[float, float]


def trial(series: Series, sp: Split, resource: str, target: str, models: Models, every: int = 24) -> Trial:
    """Peak or mean of the next hour at 0.95. Rules, margins, shift and places of the other quantiles are tuned on the
    calibration part alone."""
    peak, floor, key = target == "peak", FLOOR[resource], key_of(resource, target, QUANTILE)
    low = key_of(resource, target, MEDIAN)
    c = part(series, resource, hourly(sp.calibration, sp.train_end, sp.calibration_end, 12, 7, every), peak=peak)
    t = part(series, resource, hourly(sp.test, sp.calibration_end, sp.end, 12, 8, every), peak=peak)
    if not len(c.cases) or not len(t.cases):
        raise UsageError(f"there are too few samples of {resource} to judge a model.", "give it more days")
    chosen = best(c.actual, c.rules, QUANTILE, c.scale, c.known, floor)
    choices = {
        k: composite(c.actual, c.rules, q, c.scale, c.known, floor, c.cases.history)
        for k, q in ((low, MEDIAN), (key, QUANTILE))
    }
    shift, vms = shift_of(c, raw(models, key, c), QUANTILE), len(series.vms)
    book = Rulebook(choices)

    def told(
        forecast: Callable[[Part], F32], shift: float = 0.0, choices: Sequence[tuple[float, float]] = RULE_RATES
    ) -> tuple[F32, tuple[float, float]]:
        rates = best_rates(c, forecast(c), vms, shift, choices)
        return online(t, forecast(t), vms, shift, rates), rates

    def composed(k: str) -> Callable[[Part], F32]:
        return lambda p: book.answer(k, p.rules, p.cases.history, p.known, floor)

    ours, rates = told(lambda p: raw(models, key, p), shift, MODEL_RATES)
    rule, _ = told(lambda p: chosen.margin.apply(p.rules[chosen.rule], p.known, floor))
    mixed, _ = told(composed(key))
    losses = [pinball(t.actual, f, QUANTILE, t.scale) for f in (ours, rule, mixed)]
    own, against, composite_loss = (float(np.mean(x, dtype=np.float64)) for x in losses)
    metric = Metric(
        resource=resource,
        target=f"{target}60",
        pinball=own,
        baseline=str(chosen),
        baseline_pinball=against,
        gain=1 - own / against if against else 0.0,
        interval=gain_interval(losses[0], losses[1], t.cases.vm),
        gain_composite=1 - own / composite_loss if composite_loss else 0.0,
        coverage=float((t.actual <= ours).mean()),
    )
    spreads = {
        voice(Answerer.MODEL, resource, target): spread_of(
            c, t, lambda p: raw(models, low, p), lambda p: shifted(models, key, p, shift), ours
        ),
        voice(Answerer.BASELINE, resource, target): spread_of(c, t, composed(low), composed(key), mixed),
    }
    return Trial(metric, choices, shift, spreads, rates)
