"""Another fleet: PlanetLab's CPU records. Trained there, and with models that have never seen it, where the arbiter has
to notice that a rule is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from forecastlab import arbitrate, key_of
from forecastmodels import Taught, teach

from hvctl.forecasting.lessons import drawn
from hvctl.forecasting.rulebook import Rulebook, composite
from hvctl.forecasting.score import gain_interval, pinball
from hvctl.forecasting.series import F32, FLOOR, Series
from hvctl.forecasting.trial import QUANTILE as Q
from hvctl.forecasting.trial import hourly, online, part, raw, shift_of

ROWS: Final = 60_000
SLOTS: Final = 288


def planet(series: Series, models: Taught, say: Callable[[str], None]) -> tuple[float, list[dict[str, Any]]]:
    """The arbiter's regret, and the rows. Names are VM@DAY: rules are tuned on the first day; the second to the fourth
    day teach the models that are trained there, on a part of the machines; the others' last days are the test."""
    days = np.array([v.rpartition("@")[2] for v in series.vms])
    machine = np.array([v.rpartition("@")[0] for v in series.vms])
    order = np.unique(days)
    held = np.array([hash_of(m) % 2 == 0 for m in machine])
    tuning = np.flatnonzero(days == order[0])
    test = np.flatnonzero(np.isin(days, order[3:]) & held)
    teaching = np.flatnonzero(np.isin(days, order[1:3]) & ~held)
    key, floor = key_of("cpu", "peak60", Q), FLOOR["cpu"]
    c = part(series, "cpu", hourly(tuning, 12, SLOTS, 12, 5, 24), peak=True)
    t = part(series, "cpu", hourly(test, 12, SLOTS, 12, 6, 24), peak=True)
    book = Rulebook({key: composite(c.actual, c.rules, Q, c.scale, c.known, floor, c.cases.history)})
    rule = book.answer(key, t.rules, t.cases.history, t.known, floor)
    rows = []

    def line(case: str, told: F32, **more: Any) -> float:
        loss, other = (pinball(t.actual, f, Q, t.scale) for f in (told, rule))
        ratio = float(loss.mean() / other.mean())
        rows.append(
            {
                "case": case,
                "resource": "cpu",
                "target": "peak60",
                "cases": len(t.cases),
                "pinball": float(loss.mean()),
                "gain_composite": 1 - ratio,
                "gain_composite_interval": gain_interval(loss, other, t.cases.vm),
                "coverage": float((t.actual <= told).mean()),
                **more,
            }
        )
        say(f"{case}: {1 - ratio:+.1%} against the composite, coverage {rows[-1]['coverage']:.3f}")
        return ratio - 1

    foreign = online(t, raw(models, key, t), len(series.vms), 0.0)
    line("planetlab, foreign model alone", foreign)
    day = np.unique(days, return_inverse=True)[1] * SLOTS
    told, final = arbitrate(t, foreign, rule, day[t.cases.vm])
    regret = line(
        "planetlab, arbiter between foreign model and rules", told, model_answers=final.model, why=final.reason
    )
    own = teach(series, drawn(teaching, 0, SLOTS, ROWS), lambda _: None, (Q,))
    calibrated = shift_of(c, raw(own, key, c), Q)
    line("planetlab, trained there", online(t, raw(own, key, t), len(series.vms), calibrated))
    return regret, rows


def hash_of(name: str) -> int:
    """The same machine is on the same side on every day."""
    return sum(name.encode()) * 2654435761 % 2**32 >> 7
