"""What a forecasting benchmark measures: models taught on one part of the data, margins tuned on a second one, and both
judged on a third one against every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hvctl.forecasting.arbiter import Standing, learn
from hvctl.forecasting.lessons import HISTORIES
from hvctl.forecasting.margin import Known, capped, covering
from hvctl.forecasting.panel import Models, voice
from hvctl.forecasting.rulebook import Choice, Rulebook, best, composite
from hvctl.forecasting.score import gain_interval, pinball, score
from hvctl.forecasting.series import F32, FLOOR, Series
from hvctl.forecasting.spread import MEDIAN
from hvctl.forecasting.trial import (
    MODEL_RATES,
    RULE_RATES,
    Part,
    Split,
    best_rates,
    hourly,
    online,
    part,
    raw,
    shift_of,
    shifted,
    spread_of,
)
from hvctl.forecasting.trial import QUANTILE as Q
from hvctl.model.forecast import Answerer

SHRINK: Final = (0.5, 0.7, 0.85, 1.0)
BETWEEN: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HISTORY_NAMES: Final = {12: "1 h", 72: "6 h", 288: "1 day", 2016: "7 days"}
TARGETS: Final = {"peak60": (True, 12), "mean60": (False, 12), "peak30": (True, 6), "mean30": (False, 6)}


def key_of(resource: str, target: str, quantile: float) -> str:
    return f"{resource}-{'peak' if TARGETS[target][0] else 'mean'}-{quantile:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one resource and target; rows are for the report, the rest for the summary."""

    gain: float
    gain_composite: float
    reserved_gain: float
    coverage: float
    vm_coverage_p10: float
    choices: Mapping[int, Choice]
    best: Choice
    shift: float
    row: dict[str, Any]
    baselines: list[dict[str, Any]]
    by_history: list[dict[str, Any]]


def thriftiest(
    actual: F32, found: Mapping[str, F32], coverage: float, scale: F32, known: Known, floor: float
) -> Choice:
    """The rule that reserves least at this coverage; loss is what it reserves."""
    tuned = (Choice(name, *covering(actual, v, coverage, scale, known, floor)) for name, v in found.items())
    return min(tuned, key=lambda c: c.loss)


def judge(series: Series, sp: Split, resource: str, target: str, models: Models) -> Verdict:
    """Margins, and whether and how fast they follow each VM online, come from the calibration VMs and days, for the
    model and its opponents alike. The test VMs' own past before the test warms up the online margins of both."""
    peak, horizon = TARGETS[target]
    every = 12 if target == "peak60" else 24
    floor, key = FLOOR[resource], key_of(resource, target, Q)
    c = part(series, resource, hourly(sp.calibration, sp.train_end, sp.calibration_end, horizon, 7, every), peak=peak)
    whole = part(series, resource, hourly(sp.test, sp.train_end, sp.end, horizon, 8, every), peak=peak)
    rows = np.flatnonzero(whole.cases.cut >= sp.calibration_end)
    t = whole.take(rows)
    vms = len(series.vms)

    chosen = best(c.actual, c.rules, Q, c.scale, c.known, floor)
    choices = composite(c.actual, c.rules, Q, c.scale, c.known, floor, c.cases.history)
    medians = composite(c.actual, c.rules, MEDIAN, c.scale, c.known, floor, c.cases.history)
    thrifty = thriftiest(c.actual, shrunk(c.rules), Q, c.scale, c.known, floor)
    low = key_of(resource, target, MEDIAN)
    book = Rulebook({key: choices, low: medians})

    def told(
        forecast: Callable[[Part], F32], shift: float = 0.0, choices: Sequence[tuple[float, float]] = RULE_RATES
    ) -> tuple[F32, tuple[float, float]]:
        rates = best_rates(c, forecast(c), vms, shift, choices)
        return online(whole, forecast(whole), vms, shift, rates)[rows], rates

    def loss(forecast: F32) -> F32:
        return pinball(t.actual, forecast, Q, t.scale)

    def fixed(p: Part) -> F32:
        return chosen.margin.apply(p.rules[chosen.rule], p.known, floor)

    def composed(p: Part, quantile: str = key) -> F32:
        return book.answer(quantile, p.rules, p.cases.history, p.known, floor)

    rule, rule_rate = told(fixed)
    mixed, mixed_rate = told(composed)
    reserved = covering(t.actual, shrunk(t.rules)[thrifty.rule], Q, t.scale, t.known, floor)[1]

    shift = shift_of(c, raw(models, key, c), Q)
    ours, rate = told(lambda p: raw(models, key, p), shift, MODEL_RATES)
    between = min(
        BETWEEN, key=lambda w: covering(c.actual, mixture(models, low, key, c, w), Q, c.scale, c.known, floor)[1]
    )
    needed = covering(t.actual, mixture(models, low, key, t, between), Q, t.scale, t.known, floor)[1]
    plain = raw(models, key, t)
    kind = target[:-2]
    spreads = {
        voice(Answerer.MODEL, resource, kind): spread_of(
            c, t, lambda p: raw(models, low, p), lambda p: shifted(models, key, p, shift), ours
        ),
        voice(Answerer.BASELINE, resource, kind): spread_of(c, t, lambda p: composed(p, low), composed, mixed),
    }
    said, standing = arbitrate(t, ours, mixed)
    s = score(t.actual, ours, Q, t.scale, t.cases.vm)
    gain, against = (1 - float(loss(ours).mean() / loss(f).mean()) for f in (rule, mixed))
    row = {
        "case": "model",
        "resource": resource,
        "target": target,
        "cases": s.cases,
        "vms": len(np.unique(t.cases.vm)),
        "pinball": s.pinball,
        "gain": gain,
        "gain_interval": gain_interval(loss(ours), loss(rule), t.cases.vm),
        "gain_composite": against,
        "gain_composite_interval": gain_interval(loss(ours), loss(mixed), t.cases.vm),
        "gain_against_fixed_margin": 1 - float(loss(ours).mean() / loss(fixed(t)).mean()),
        "gain_composite_against_fixed_margins": 1 - float(loss(ours).mean() / loss(composed(t)).mean()),
        "gain_of_raw_model_against_fixed_margin": 1 - float(loss(plain).mean() / loss(fixed(t)).mean()),
        "gain_composite_of_arbiter": 1 - float(loss(said).mean() / loss(mixed).mean()),
        "arbiter": standing.reason,
        "online_rates": {"model": rate, "baseline": rule_rate, "composite": mixed_rate},
        "coverage": s.coverage,
        "coverage_of_raw_model": float((t.actual <= plain).mean()),
        "vm_coverage_p10": s.vm_coverage_p10,
        "reserved_at_95": needed / s.actual,
        "reserved_at_95_baseline": reserved / s.actual,
        "reserved_gain": 1 - needed / reserved,
        "between_median_and_quantile": between,
        "unserved": s.unserved,
        "baseline": str(chosen),
        "baseline_reserved": str(thrifty),
        "composite": {HISTORY_NAMES[h]: str(x) for h, x in choices.items()},
        "shift": float(np.exp(shift)),
        "spreads": {
            voice: [[x.quantile, x.place, x.margin, x.coverage] for x in levels] for voice, levels in spreads.items()
        },
    }
    lines = by_history(t, ours, rule, mixed, resource, target)
    others = baselines(c, t, floor, resource, target)
    row["gain_hindsight"] = 1 - s.pinball / min(x["pinball"] for x in others)
    return Verdict(
        gain, against, 1 - needed / reserved, s.coverage, s.vm_coverage_p10, choices, chosen, shift, row, others, lines
    )


def shrunk(found: Mapping[str, F32]) -> dict[str, F32]:
    """For the least that can be reserved a rule may be scaled down before its margin, as a model may be."""
    return {f"{a:g} {name}": np.float32(a) * values for name, values in found.items() for a in SHRINK}


def mixture(models: Models, low: str, high: str, p: Part, weight: float) -> F32:
    """Between a model's median and its upper quantile, in log space: how much a model reserves where it is unsure."""
    below, above = (np.log(raw(models, key, p) + p.made.floor) for key in (low, high))
    return capped(np.exp((1 - weight) * below + weight * above) - p.made.floor, p.known.size)


def by_history(t: Part, ours: F32, rule: F32, mixed: F32, resource: str, target: str) -> list[dict[str, Any]]:
    """New VMs (1 h and 6 h of history) in rows of their own."""
    found = []
    for history in HISTORIES:
        at = t.cases.history == history
        if not at.any():
            continue
        s = score(t.actual[at], ours[at], Q, t.scale[at], t.cases.vm[at])
        loss = [pinball(t.actual[at], f[at], Q, t.scale[at]) for f in (ours, rule, mixed)]
        found.append(
            {
                "case": f"model with {HISTORY_NAMES[history]} of history",
                "resource": resource,
                "target": target,
                "cases": s.cases,
                "pinball": s.pinball,
                "gain": 1 - float(loss[0].mean() / loss[1].mean()),
                "gain_composite": 1 - float(loss[0].mean() / loss[2].mean()),
                "gain_composite_interval": gain_interval(loss[0], loss[2], t.cases.vm[at]),
                "coverage": s.coverage,
            }
        )
    return found


def baselines(c: Part, t: Part, floor: float, resource: str, target: str) -> list[dict[str, Any]]:
    """Every rule with its own tuned margin."""
    found = []
    for name, values in c.rules.items():
        choice = best(c.actual, {name: values}, Q, c.scale, c.known, floor)
        told = choice.margin.apply(t.rules[name], t.known, floor)
        s = score(t.actual, told, Q, t.scale, t.cases.vm)
        found.append(
            {
                "case": f"rule {name}",
                "resource": resource,
                "target": target,
                "margin": f"{choice.margin.kind.value} {choice.margin.amount:.4g}",
                "pinball": s.pinball,
                "coverage": s.coverage,
                "vm_coverage_p10": s.vm_coverage_p10,
                "reserved": s.reserved / s.actual,
                "unserved": s.unserved,
            }
        )
    return found


def arbitrate(t: Part, model: F32, rule: F32, offset: Any = 0) -> tuple[F32, Standing]:
    """What the arbiter would have told, hour by hour: an outcome counts once it is complete. offset: slots of each case
    before its series begins."""
    asked = (offset + t.cases.cut) // 12
    known = -(-(offset + t.cases.cut + t.cases.gap + t.cases.horizon) // 12)
    losses = [pinball(t.actual, f, Q, t.scale) for f in (model, rule)]
    told = np.empty_like(rule)
    standing = Standing()
    vms: set[int] = set()
    for hour in np.unique(np.concatenate([asked, known])):
        past = known == hour
        if past.any():
            vms |= set(t.cases.vm[past].tolist())
            means = (float(loss[past].mean()) for loss in losses)
            standing = learn(standing, *means, int(past.sum()), len(vms))
        now = asked == hour
        told[now] = (model if standing.model else rule)[now]
    return told, standing
