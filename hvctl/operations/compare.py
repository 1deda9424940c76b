"""What came beside what was forecast: who is to answer for a resource, how much is added to what each says so that its
coverage stays as stated, and how far that has drifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.engine.operate import Engine
from hvctl.forecasting.arbiter import Standing
from hvctl.forecasting.drift import Coverage
from hvctl.forecasting.panel import Panel, voice
from hvctl.forecasting.rounds import HORIZON, Lessons
from hvctl.forecasting.series import RESOURCES
from hvctl.forecasting.spread import UPPER
from hvctl.model.forecast import Answerer

AWAITED: Final = 7200
"""Seconds that are waited for what came: a roll-up may be late, and a VM may be off."""
FORGOTTEN: Final = 7 * 86400.0
"""Seconds after which the margin of a VM, or of a set of models, from which nothing was learned goes."""


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


def learned(engine: Engine, panel: Panel, vms: Sequence[str] | None = None) -> Lessons:
    """What this node's own record says of the models in use, and of these VMs, or of all."""
    host, store, name = engine.facts.name, engine.store.forecasts, panel.name or ""
    return Lessons(
        panel, store.fleet_margins(host, name), store.vm_margins(host, name, vms), store.standings(host).values()
    )


def drift(engine: Engine, panel: Panel) -> list[Drift]:
    """Of everybody whose forecasts were compared with what came."""
    known = learned(engine, panel)
    made = known.margins()
    found = []
    for f in known.fleet():
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


def learn(engine: Engine, panel: Panel, now: int) -> int:
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
    own = store.vm_margins(host, panel.name or "", sorted({p.vm_uuid for p in made}))
    lessons = Lessons(panel, fleet, own, store.standings(host).values())
    number = lessons.learn(made)
    store.learn(
        host, list(lessons.new_stood.values()), list(lessons.new_fleet.values()), list(lessons.new_own.values())
    )
    return number
