"""What came beside what was forecast: who is to answer for a resource, how much is added to what each says so that its
coverage stays as stated, and how far that has drifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.arbiter import MIN_CASES, Standing, learn
from hvctl.forecasting.drift import Coverage
from hvctl.forecasting.margin import FLEET_RATE, RATE, OnlineMargin
from hvctl.forecasting.panel import Panel, key_of, voice
from hvctl.forecasting.score import pinball
from hvctl.forecasting.series import F32, RESOURCES, TARGETS
from hvctl.forecasting.spread import UPPER
from hvctl.model.forecast import Answerer
from hvctl.model.prediction import FleetMargin, Prediction, Recorded, VmMargin

HORIZON: Final = 3600
AWAITED: Final = 7200
"""Seconds that are waited for what came: a roll-up may be late, and a VM may be off."""
FORGOTTEN: Final = 7 * 86400.0
"""Seconds after which the margin of a VM, or of a set of models, from which nothing was learned goes."""
_Whose: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Drift:
    """How one answerer keeps its coverage on this node. stated is the quantile, observed the share of its last cases
    that stayed below (None: there were none yet), cases their whole number. margin is the factor that the fleet's
    margin is now, with the calibration's; of the VMs that have one of their own, vm_median and vm_most are theirs.
    answering: it is the one that answers now."""

    resource: str
    target: str
    answered: str
    answering: bool
    stated: float
    observed: float | None
    cases: int
    margin: float
    vms: int
    vm_median: float
    vm_most: float


def standings(engine: Engine, name: str | None) -> dict[str, Standing]:
    """By resource and target. Another model than the one that was compared has not won anything yet."""
    found = engine.store.forecasts.standings(engine.facts.name).values()
    return {
        f"{r.resource}-{r.target}": Standing(r.model_loss, r.rule_loss, r.cases, r.vms, r.model)
        for r in found
        if r.model_name == name
    }


def margins(engine: Engine, panel: Panel, vms: Sequence[str] | None = None) -> dict[str, OnlineMargin]:
    """By the key of forecasting.panel.voice, in the order of these VMs, or of all that have one."""
    fleet, own = engine.store.forecasts.fleet_margins(engine.facts.name, panel.name or ""), _own(engine, panel, vms)
    names = sorted(set().union(*own.values())) if vms is None else vms
    return {
        voice(Answerer(f.answered), f.resource, f.target): _margin(f, own.get(_whose(f), {}), names, panel)
        for f in fleet
    }


def coverages(engine: Engine, name: str | None) -> dict[str, float]:
    """By the same key, where enough cases were seen."""
    found = engine.store.forecasts.fleet_margins(engine.facts.name, name or "")
    return {
        voice(Answerer(f.answered), f.resource, f.target): f.covered / f.recent for f in found if f.cases >= MIN_CASES
    }


def drift(engine: Engine, panel: Panel) -> list[Drift]:
    """Of everybody whose forecasts were compared with what came."""
    made = margins(engine, panel)
    found = []
    for f in engine.store.forecasts.fleet_margins(engine.facts.name, panel.name or ""):
        margin = made[voice(Answerer(f.answered), f.resource, f.target)]
        moved = margin.drift()
        wins = panel.standings.get(f"{f.resource}-{f.target}", Standing()).model
        found.append(
            Drift(
                resource=f.resource,
                target=f.target,
                answered=f.answered,
                answering=wins == (f.answered == Answerer.MODEL),
                stated=UPPER,
                observed=Coverage(f.cases, f.recent, f.covered).share,
                cases=f.cases,
                margin=float(np.exp(max(0.0, margin.shift + margin.fleet))),
                vms=int(moved["vms"]),
                vm_median=moved["median"],
                vm_most=moved["max"],
            )
        )
    return sorted(found, key=lambda d: (RESOURCES.index(d.resource), d.target != "peak", not d.answering))


def learned(engine: Engine, panel: Panel, now: int) -> int:
    """Teach the arbiter and the margins what came; how many peaks. Forecasts of hours that overlap are no independent
    witnesses, so of each resource one round an hour is learned from, once, and only what was said with the set of
    models that is in use."""
    host, store = engine.facts.name, engine.store.forecasts
    fleet = store.fleet_margins(host, panel.name or "")
    # The hour that was learned from last is not over for any of them before it is for the newest.
    due = max((f.learned_at for f in fleet), default=-HORIZON) + HORIZON - 1
    made = [p for p in store.made(host, max(now - HORIZON - AWAITED, due), now - HORIZON) if p.model == panel.name]
    store.forget(host, now - FORGOTTEN)
    if not made:
        return 0
    own = _own(engine, panel, sorted({p.vm_uuid for p in made}))
    state = _State(panel, {_whose(f): f for f in fleet}, own, store.standings(host))
    number = 0
    for resource in RESOURCES:
        ours = [p for p in made if p.resource == resource]
        for target in TARGETS:
            known = [p for p in ours if _of(p, "actual", target) is not None and _of(p, "rule", target) is not None]
            for made_at, group in groupby(known, key=lambda p: p.made_at):
                cases = list(group)
                taught = state.margin(Answerer.BASELINE, resource, target, made_at, cases)
                said = [p for p in cases if _of(p, "model", target) is not None]
                if said:
                    state.margin(Answerer.MODEL, resource, target, made_at, said)
                    state.stand(resource, target, made_at, said)
                number += len(cases) if taught and target == "peak" else 0
    store.learn(host, list(state.stood.values()), list(state.fleet.values()), list(state.own.values()))
    return number


class _State:
    """What is known before, and what of it has changed."""

    def __init__(
        self,
        panel: Panel,
        fleet: Mapping[_Whose, FleetMargin],
        own: Mapping[_Whose, Mapping[str, VmMargin]],
        stood: Mapping[tuple[str, str], Recorded],
    ) -> None:
        self._panel, self._name = panel, panel.name or ""
        self._fleet, self._stood = dict(fleet), dict(stood)
        self._own = {whose: dict(found) for whose, found in own.items()}
        self.fleet: dict[_Whose, FleetMargin] = {}
        self.own: dict[tuple[_Whose, str], VmMargin] = {}
        self.stood: dict[tuple[str, str], Recorded] = {}

    def margin(self, by: Answerer, resource: str, target: str, made_at: int, cases: Sequence[Prediction]) -> bool:
        """Whether anything was learned: not from an hour that overlaps one that was."""
        key = (by.value, resource, target)
        before = self._fleet.get(key, FleetMargin(self._name, *key, 0.0, 0, 0.0, 0.0, -HORIZON))
        if made_at < before.learned_at + HORIZON:
            return False
        vms = [p.vm_uuid for p in cases]
        own = self._own.setdefault(key, {})
        margin = _margin(before, own, vms, self._panel)
        who = "model" if by is Answerer.MODEL else "rule"
        missed = _array(cases, "actual", target) > _array(cases, who, target)
        margin.learn(np.arange(len(vms)), missed.astype(np.float32))
        seen = Coverage(before.cases, before.recent, before.covered).after(int((~missed).sum()), len(vms))
        new = before._replace(
            level=margin.fleet, cases=seen.cases, recent=seen.recent, covered=seen.covered, learned_at=made_at
        )
        self._fleet[key] = self.fleet[key] = new
        for vm, level, number in zip(vms, margin.level.tolist(), margin.seen.tolist(), strict=True):
            own[vm] = self.own[key, vm] = VmMargin(self._name, *key, vm, level, number, made_at)
        return True

    def stand(self, resource: str, target: str, made_at: int, cases: Sequence[Prediction]) -> None:
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
        self._stood[resource, target] = self.stood[resource, target] = record._replace(
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


def _whose(margin: FleetMargin | VmMargin) -> _Whose:
    """Answerer, resource and target."""
    return margin.answered, margin.resource, margin.target


def _own(engine: Engine, panel: Panel, vms: Sequence[str] | None) -> dict[_Whose, dict[str, VmMargin]]:
    """The margins of these VMs, or of all, by VM."""
    own: dict[_Whose, dict[str, VmMargin]] = {}
    for one in engine.store.forecasts.vm_margins(engine.facts.name, panel.name or "", vms):
        own.setdefault(_whose(one), {})[one.vm_uuid] = one
    return own


def _margin(fleet: FleetMargin, own: Mapping[str, VmMargin], vms: Sequence[str], panel: Panel) -> OnlineMargin:
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
