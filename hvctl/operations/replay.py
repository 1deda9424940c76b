"""replay: policies on a recorded trace, on simulated hosts, side by side. It touches no host and no record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hvctl.forecasting.series import STEP, UNITS
from hvctl.operations.model import panel
from hvctl.replay.fleet import COUNTED, SHORTEST, Fleet, fleet_of
from hvctl.replay.policy import Policy
from hvctl.replay.run import Result, replay
from hvctl.settings import Settings
from hvctl.units import format_time

WEEK: Final = 7 * 86400 // STEP
_FIRST: Final = 0.25
"""The share of a trace that is shorter than four weeks that comes before, so that something can be forecast."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the policies are replayed. first: seconds of the trace that come before and are history (None: a week, or a
    quarter of a shorter trace); lasts: seconds that are replayed (None: the rest). hosts, vms: None is as the trace
    says. rules: the model is not asked, since it was made from this very trace."""

    trace: Path
    fit: float = 0.6
    hosts: int | None = None
    vms: int | None = None
    seed: int = 1
    first: float | None = None
    lasts: float | None = None
    rules: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    fleet: Fleet
    results: tuple[Result, ...]
    forecasts: str

    def document(self, scene: Scene) -> dict[str, Any]:
        fleet = self.fleet
        start = fleet.series.start + fleet.begin * STEP
        return {
            "trace": scene.trace.name,
            "vms": len(fleet.members),
            "guaranteed": sum(m.guaranteed for m in fleet.members),
            "hosts": len(fleet.capacities),
            "fit": scene.fit,
            "seed": scene.seed,
            "start": format_time(start),
            "seconds": fleet.seconds,
            "forecasts": self.forecasts,
            "policies": [r.tally.row(r.policy.name) for r in self.results],
        }


def compare(settings: Settings, scene: Scene, policies: Sequence[Policy], say: Callable[[str], None]) -> Compared:
    """NotFoundError, UsageError for a trace that cannot be replayed."""
    from hvctl.adapters.models.seriesfile import read

    series = read(scene.trace)
    usual = max(SHORTEST, min(WEEK, int(series.slots * _FIRST)))
    begin = usual if scene.first is None else round(scene.first / STEP)
    if scene.lasts is not None:
        series = series.until(begin + max(1, round(scene.lasts / STEP)))
    fleet = fleet_of(series, begin=begin, fit=scene.fit, hosts=scene.hosts, vms=scene.vms, seed=scene.seed)
    asked = panel(settings)
    if scene.rules:
        asked = replace(asked, models=None, missing="the model was not asked")
    words = "the rules" if asked.models is None else f"the rules, and {asked.name} where it wins on this trace"
    results = []
    for policy in policies:
        say(f"{policy.name}: {fleet.seconds / 86400:.1f} days of {len(fleet.members)} VMs")
        results.append(replay(fleet, policy, asked))
    return Compared(fleet, tuple(results), words)


def plot(compared: Compared, path: Path) -> None:
    """What was demanded, and what each policy held for it, over time. HvctlError if it cannot be written."""
    from hvctl.adapters.models.plot import Curve, Stack, compare

    panels = []
    for resource in COUNTED:
        demand = compared.results[0].tally.shown[resource][:, 0]
        curves = [Curve("demand", demand, filled=True)]
        for one in compared.results:
            shown = one.tally.shown[resource]
            curves.append(Curve(one.policy.name, shown[:, 2] + shown[:, 3]))
        panels.append(Stack(f"{resource} ({UNITS[resource]})", tuple(curves)))
    days = compared.fleet.seconds / 86400
    compare(path, f"{len(compared.fleet.members)} VMs over {days:.1f} days: what is reserved", panels)


def check_plot(path: Path | None) -> None:
    """Before anything is replayed."""
    if path is not None:
        from hvctl.adapters.models.plot import check

        check(path)
