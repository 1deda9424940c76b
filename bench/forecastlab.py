"""What a forecasting benchmark measures: models taught on one part of the data, margins tuned on a second one, and both
judged on a third one against every rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from forecastcases import HISTORY_NAMES, Split, hourly

from hvctl.adapters.boosters import Silence
from hvctl.forecasting.lessons import HISTORIES, measured, scales
from hvctl.forecasting.margin import Known, OnlineMargin, capped, covering, follow, quantile_of
from hvctl.forecasting.features import Features, features
from hvctl.forecasting.rulebook import Choice, Rulebook, best, composite, thriftiest
from hvctl.forecasting.rules import rules
from hvctl.forecasting.score import gain_interval, pinball, score
from hvctl.forecasting.series import F32, FLOOR, Cases, Series, outcomes

Q: Final = 0.95
TARGETS: Final = {"peak60": (True, 12), "mean60": (False, 12), "peak30": (True, 6), "mean30": (False, 6)}
PATIENCE: Final = 600.0


class Predictor(Protocol):
    def predict(self, key: str, x: F32, seconds: float) -> F32 | Silence: ...


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


def key_of(resource: str, target: str, quantile: float) -> str:
    return f"{resource}-{'peak' if TARGETS[target][0] else 'mean'}-{quantile:g}"


def part(series: Series, resource: str, target: str, cases: Cases) -> Part:
    peak, _ = TARGETS[target]
    cases = measured(series, resource, cases)
    actual = outcomes(series, resource, cases)[0 if peak else 1]
    found = rules(series, resource, cases, peak=peak)
    made = features(series, resource, cases)
    seen = Known(series.size(resource)[cases.vm], found["max_7d"])
    return Part(cases, actual, scales(series, resource)[cases.vm], seen, made, found)


def raw(models: Predictor, key: str, p: Part) -> F32:
    """The model's own quantile, without any margin."""
    said = models.predict(key, p.made.x, PATIENCE)
    if isinstance(said, Silence):
        raise RuntimeError(said.reason)
    return capped(p.made.value(said), p.known.size)


def shift_of(p: Part, forecast: F32, quantile: float) -> float:
    """By how much (logarithm) the calibration part is missed; never less than 0."""
    missing = np.log((p.actual + p.made.floor) / (forecast + p.made.floor))
    return max(0.0, quantile_of(missing, np.ones_like(missing), quantile))


def online(p: Part, forecast: F32, vms: int, shift: float, quantile: float = Q) -> F32:
    ends = p.cases.cut + p.cases.gap + p.cases.horizon
    margin = OnlineMargin(vms, quantile, shift)
    return follow(margin, p.cases.vm, p.cases.cut, ends, forecast, p.actual, p.made.floor, p.known.size)


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


def judge(series: Series, sp: Split, resource: str, target: str, models: Predictor) -> Verdict:
    """Margins come from the calibration VMs and days. The test VMs' own past before the test (never their future)
    warms up the online margins, of both sides; of each opponent the better of fixed and online margin counts."""
    horizon = TARGETS[target][1]
    every = 12 if target == "peak60" else 24
    floor, key = FLOOR[resource], key_of(resource, target, Q)
    c = part(series, resource, target, hourly(sp.calibration, sp.train_end, sp.calibration_end, horizon, 7, every))
    whole = part(series, resource, target, hourly(sp.test, sp.train_end, sp.end, horizon, 8, every))
    rows = np.flatnonzero(whole.cases.cut >= sp.calibration_end)
    t = whole.take(rows)
    vms = len(series.vms)

    chosen = best(c.actual, c.rules, Q, c.scale, c.known, floor)
    choices = composite(c.actual, c.rules, Q, c.scale, c.known, floor, c.cases.history)
    thrifty = thriftiest(c.actual, c.rules, Q, c.scale, c.known, floor)
    book = Rulebook({key: choices})

    def both(forecast: F32) -> tuple[F32, F32]:
        return forecast[rows], online(whole, forecast, vms, 0.0)[rows]

    def loss(forecast: F32) -> F32:
        return pinball(t.actual, forecast, Q, t.scale)

    rule = min(both(chosen.margin.apply(whole.rules[chosen.rule], whole.known, floor)), key=lambda f: loss(f).mean())
    mixed = min(both(book.answer(key, whole.rules, whole.cases.history, whole.known, floor)), key=lambda f: loss(f).mean())
    spare = both(thrifty.margin.apply(whole.rules[thrifty.rule], whole.known, floor))
    reserved = min(covering(t.actual, f, Q, t.scale, t.known, floor)[1] for f in spare)

    shift = shift_of(c, raw(models, key, c), Q)
    plain = raw(models, key, whole)
    ours = online(whole, plain, vms, shift)[rows]
    needed = covering(t.actual, ours, Q, t.scale, t.known, floor)[1]
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
        "gain_without_margins": 1 - float(loss(plain[rows]).mean() / loss(rule).mean()),
        "coverage": s.coverage,
        "coverage_without_margins": float((t.actual <= plain[rows]).mean()),
        "vm_coverage_p10": s.vm_coverage_p10,
        "reserved_at_95": needed / s.actual,
        "reserved_at_95_baseline": reserved / s.actual,
        "reserved_gain": 1 - needed / reserved,
        "unserved": s.unserved,
        "baseline": str(chosen),
        "baseline_reserved": str(thrifty),
        "composite": {HISTORY_NAMES[h]: str(x) for h, x in choices.items()},
        "shift": float(np.exp(shift)),
    }
    lines = by_history(t, ours, rule, mixed, resource, target)
    others = baselines(c, t, floor, resource, target)
    row["gain_hindsight"] = 1 - s.pinball / min(x["pinball"] for x in others)
    return Verdict(gain, against, 1 - needed / reserved, s.coverage, s.vm_coverage_p10, choices, chosen, shift, row, others, lines)


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
