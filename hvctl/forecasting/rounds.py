"""Rounds of a node's forecasts: the model and the best rule are both asked about every VM, whoever answers, and of what
came an hour later the arbiter and the margins learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from hvctl.forecasting.arbiter import MIN_CASES, Standing, learn
from hvctl.forecasting.drift import Coverage
from hvctl.forecasting.forecast import forecasts
from hvctl.forecasting.lessons import scales
from hvctl.forecasting.margin import FLEET_RATE, RATE, OnlineMargin
from hvctl.forecasting.panel import Panel, key_of, voice
from hvctl.forecasting.score import pinball
from hvctl.forecasting.series import F32, RESOURCES, STEP, TARGETS, Cases, Series, outcomes
from hvctl.forecasting.spread import UPPER
from hvctl.model.forecast import Answerer
from hvctl.model.prediction import FleetMargin, Prediction, Recorded, VmMargin

HORIZON: Final = 3600
"""Seconds."""
Whose: TypeAlias = tuple[str, str, str]
"""Answerer, resource and target."""


def predictions(series: Series, panel: Panel, made_at: int) -> list[Prediction]:
    """One for each VM and resource of which anything was seen."""
    resources = [r for r in RESOURCES if r in series.values]
    if not len(series.vms):
        return []
    nobody = replace(panel, models=None, standings={}, missing=panel.missing or "not asked")
    # Everybody's word, whoever answers: as if the model had won everything.
    won = {f"{r}-{t}": Standing(model=True) for r in resources for t in TARGETS}
    said = forecasts(series, [nobody, replace(panel, standings=won)], resources=resources, quantiles=(UPPER,))
    rules, models = ({(line.vm, line.resource): line for line in lines} for lines in said)
    scale = {r: scales(series, r) for r in resources}
    found = []
    for i, vm in enumerate(series.vms):
        for resource in resources:
            rule = rules[vm, resource]
            if not rule.history:
                continue
            model = models[vm, resource]
            peak, mean = (
                model if by is Answerer.MODEL and panel.standings.get(f"{resource}-{t}", Standing()).model else rule
                for t, by in (("peak", model.answered), ("mean", model.mean_answered))
            )
            found.append(
                Prediction(
                    made_at=made_at,
                    vm_uuid=vm,
                    resource=resource,
                    horizon=rule.horizon,
                    quantile=rule.quantile,
                    peak=peak.peak,
                    mean=min(mean.mean, peak.peak),
                    rule=peak.rule,
                    answered=peak.answered.value,
                    model=panel.name,
                    model_peak=model.peak if model.answered is Answerer.MODEL else None,
                    rule_peak=rule.peak,
                    scale=float(scale[resource][i]),
                    model_mean=model.mean if model.mean_answered is Answerer.MODEL else None,
                    rule_mean=rule.mean,
                )
            )
    return found


def came(series: Series, made: Sequence[Prediction]) -> list[Prediction]:
    """Those forecasts of whose hour something was measured, with what came. An hour that ends after the series does is
    not over yet, as far as anybody can tell."""
    place = {vm: i for i, vm in enumerate(series.vms)}
    found = []
    for resource, values in groupby(sorted(made, key=lambda p: p.resource), key=lambda p: p.resource):
        ours = [p for p in values if p.vm_uuid in place and p.made_at >= series.start]
        if not ours or resource not in series.values:
            continue
        cut = np.array([(p.made_at - series.start) // STEP for p in ours])
        vm = np.array([place[p.vm_uuid] for p in ours])
        horizon = np.array([p.horizon // STEP for p in ours])
        actual = zip(ours, *outcomes(series, resource, Cases(vm, cut, np.zeros_like(cut), horizon, cut)), strict=True)
        found += [p._replace(actual_peak=float(v), actual_mean=float(m)) for p, v, m in actual if np.isfinite(v)]
    return found


class Lessons:
    """What was learned before: margins of the fleet and of VMs, and who has won, of the models in use. The same of what
    has changed since is in new_fleet, new_own and new_stood."""

    def __init__(
        self,
        panel: Panel,
        fleet: Iterable[FleetMargin] = (),
        own: Iterable[VmMargin] = (),
        stood: Iterable[Recorded] = (),
    ) -> None:
        self._panel, self._name = panel, panel.name or ""
        self._fleet = {whose(f): f for f in fleet}
        self._own: dict[Whose, dict[str, VmMargin]] = {}
        for one in own:
            self._own.setdefault(whose(one), {})[one.vm_uuid] = one
        self._stood = {(r.resource, r.target): r for r in stood}
        self.new_fleet: dict[Whose, FleetMargin] = {}
        self.new_own: dict[tuple[Whose, str], VmMargin] = {}
        self.new_stood: dict[tuple[str, str], Recorded] = {}

    def learn(self, made: Sequence[Prediction]) -> int:
        """From forecasts of which it is known what came; how many peaks. Forecasts of hours that overlap are no
        independent witnesses, so of each resource one round an hour is learned from, once."""
        number = 0
        for resource in RESOURCES:
            ours = [p for p in made if p.resource == resource]
            for target in TARGETS:
                known = [p for p in ours if _of(p, "actual", target) is not None and _of(p, "rule", target) is not None]
                for made_at, group in groupby(known, key=lambda p: p.made_at):
                    cases = list(group)
                    taught = self._margin(Answerer.BASELINE, resource, target, made_at, cases)
                    said = [p for p in cases if _of(p, "model", target) is not None]
                    if said:
                        self._margin(Answerer.MODEL, resource, target, made_at, said)
                        self._stand(resource, target, made_at, said)
                    number += len(cases) if taught and target == "peak" else 0
        return number

    def standings(self) -> dict[str, Standing]:
        """By resource and target. Another model than the one that was compared has not won anything yet."""
        return {
            f"{r.resource}-{r.target}": Standing(r.model_loss, r.rule_loss, r.cases, r.vms, r.model)
            for r in self._stood.values()
            if r.model_name == self._name
        }

    def fleet(self) -> list[FleetMargin]:
        return list(self._fleet.values())

    def coverages(self) -> dict[str, float]:
        """By the key of forecasting.panel.voice, where enough cases were seen."""
        enough = (f for f in self._fleet.values() if f.cases >= MIN_CASES)
        return {voice(Answerer(f.answered), f.resource, f.target): f.covered / f.recent for f in enough}

    def margins(self, vms: Sequence[str] | None = None) -> dict[str, OnlineMargin]:
        """By the key of forecasting.panel.voice, in the order of these VMs, or of all that have one."""
        names = sorted(set().union(*self._own.values())) if vms is None else vms
        return {
            voice(Answerer(f.answered), f.resource, f.target): margin_of(f, self._own.get(key, {}), names, self._panel)
            for key, f in self._fleet.items()
        }

    def _margin(self, by: Answerer, resource: str, target: str, made_at: int, cases: Sequence[Prediction]) -> bool:
        """Whether anything was learned: not from an hour that overlaps one that was."""
        key = (by.value, resource, target)
        before = self._fleet.get(key, FleetMargin(self._name, *key, 0.0, 0, 0.0, 0.0, -HORIZON))
        if made_at < before.learned_at + HORIZON:
            return False
        vms = [p.vm_uuid for p in cases]
        own = self._own.setdefault(key, {})
        margin = margin_of(before, own, vms, self._panel)
        who = "model" if by is Answerer.MODEL else "rule"
        missed = _array(cases, "actual", target) > _array(cases, who, target)
        margin.learn(np.arange(len(vms)), missed.astype(np.float32))
        seen = Coverage(before.cases, before.recent, before.covered).after(int((~missed).sum()), len(vms))
        new = before._replace(
            level=margin.fleet, cases=seen.cases, recent=seen.recent, covered=seen.covered, learned_at=made_at
        )
        self._fleet[key] = self.new_fleet[key] = new
        for vm, level, number in zip(vms, margin.level.tolist(), margin.seen.tolist(), strict=True):
            own[vm] = self.new_own[key, vm] = VmMargin(self._name, *key, vm, level, number, made_at)
        return True

    def _stand(self, resource: str, target: str, made_at: int, cases: Sequence[Prediction]) -> None:
        record = self._stood.get((resource, target))
        if record is None or record.model_name != self._name:
            record = Recorded(resource, target, self._name, 0.0, 0.0, 0, 0, False, -HORIZON)
        if made_at < record.learned_at + HORIZON:
            return
        before = Standing(record.model_loss, record.rule_loss, record.cases, record.vms, record.model)
        actual, scale = _array(cases, "actual", target), np.array([p.scale for p in cases], np.float32)
        model, rule = (
            float(np.mean(pinball(actual, _array(cases, who, target), UPPER, scale), dtype=np.float64))
            for who in ("model", "rule")
        )
        new = learn(before, model, rule, len(cases), len(cases))
        self._stood[resource, target] = self.new_stood[resource, target] = record._replace(
            model_loss=new.model_loss,
            rule_loss=new.rule_loss,
            cases=new.cases,
            vms=new.vms,
            model=new.model,
            learned_at=made_at,
        )


def _of(prediction: Prediction, who: str, target: str) -> Any:
    return getattr(prediction, f"{who}_{target}")


def _array(cases: Sequence[Prediction], who: str, target: str) -> F32:
    return np.array([_of(p, who, target) for p in cases], np.float32)


def whose(margin: FleetMargin | VmMargin) -> Whose:
    return margin.answered, margin.resource, margin.target


def margin_of(fleet: FleetMargin, own: Mapping[str, VmMargin], vms: Sequence[str], panel: Panel) -> OnlineMargin:
    """As it was left, in the order of these VMs."""
    by_model = fleet.answered == Answerer.MODEL
    shift = panel.shifts.get(key_of(fleet.resource, fleet.target, UPPER), 0.0) if by_model else 0.0
    rates = panel.rates.get(voice(Answerer(fleet.answered), fleet.resource, fleet.target), (RATE, FLEET_RATE))
    margin = OnlineMargin(len(vms), UPPER, shift, *rates)
    margin.fleet = fleet.level
    for i, vm in enumerate(vms):
        one = own.get(vm)
        if one is not None:
            margin.level[i], margin.seen[i] = one.level, one.seen
    return margin
