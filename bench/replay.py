"""bench-replay: 300 VMs of a recorded trace on hosts that fit 60 % of their sizes, allocated by forecast, beside the
lowest priorities first and beside static percentages. Writes build/bench/replay.json.

The last days of the trace are replayed. The rules and their margins are chosen on the days before; no model is asked,
since the shipped one was made from this trace. What a static percentage would have to reserve is taken from hosts that
fit everything, where it is never short of room: on the same hosts it could only serve less."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from forecast import traces
from report import say, write

from hvctl.adapters.models.seriesfile import read
from hvctl.errors import HvctlError
from hvctl.forecasting.panel import Panel, key_of
from hvctl.forecasting.rulebook import Rulebook, composite
from hvctl.forecasting.series import FLOOR, Series
from hvctl.forecasting.trial import DAY, QUANTILE, hourly, part
from hvctl.operations.replaypolicy import load
from hvctl.replay.fleet import COUNTED, Fleet, fleet_of
from hvctl.replay.policy import Policy
from hvctl.replay.run import replay

VMS: Final = 300
FIT: Final = 0.6
DAYS: Final = 4
SEEDS: Final = (1, 2, 3)
"""Three fleets: hosts, priorities and who is guaranteed, which no trace tells, decide how short of room they are."""
TUNED: Final = 28
"""Days before those that are replayed on which the rules are chosen."""
NAMES: Final = ("forecast", "lowest-priority-first", "lowest-priority-kept")
SAME_HOSTS: Final = (30.0, 40.0, 50.0)
ENOUGH_ROOM: Final = tuple(float(p) for p in range(20, 101, 5))
"""So near each other that a straight line between two of them flatters nobody by much."""


def book(series: Series, begin: int) -> Rulebook:
    """The best rule for each length of history, on the days before `begin` alone."""
    past = series.until(begin)
    cases = hourly(np.arange(len(series.vms)), max(0, begin - TUNED * DAY), begin, 12, 9, DAY)
    choices = {}
    for resource in COUNTED:
        p = part(past, resource, cases, peak=True)
        found = composite(p.actual, p.rules, QUANTILE, p.scale, p.known, FLOOR[resource], p.cases.history)
        choices[key_of(resource, "peak", QUANTILE)] = found
    return Rulebook(choices)


def told(fleet: Fleet, policy: Policy, panel: Panel, case: str) -> dict[str, Any]:
    began = time.process_time()
    row = {"case": case, **replay(fleet, policy, panel).tally.row(policy.name), "percent": policy.percent}
    row["seconds"] = time.process_time() - began
    lacking = ", ".join(f"{r} {row[f'{r}_unserved'] / row[f'{r}_demand']:.2%}" for r in COUNTED)
    say(
        f"{case} {policy.name} {policy.percent or ''}: {row['interruptions']} interrupted, {row['waited']} had to "
        f"wait, unserved {lacking}; {row['seconds']:.0f} s"
    )
    return row


def at_equal(resource: str, unserved: float, rows: Sequence[dict[str, Any]]) -> float:
    """What static percentages reserve where they leave the same demand unserved: between the two nearest of them."""
    ordered = sorted(rows, key=lambda row: -row[f"{resource}_unserved"])
    lacking = [-row[f"{resource}_unserved"] for row in ordered]
    return float(np.interp(-unserved, lacking, [row[f"{resource}_reserved"] for row in ordered]))


def side_by_side(fleet: Fleet, ample: Fleet) -> list[dict[str, Any]]:
    """ample: the same VMs on hosts that fit all of them."""
    panel = Panel(book(fleet.series, fleet.begin), missing="the shipped model was made from this trace")
    static = load("static")
    return [
        *(told(fleet, load(name), panel, "same hosts") for name in NAMES),
        *(told(fleet, replace(static, percent=p), panel, "same hosts") for p in SAME_HOSTS),
        *(told(ample, replace(static, percent=p), panel, "enough room") for p in ENOUGH_ROOM),
    ]


@dataclass(frozen=True)
class Verdict:
    """Of one fleet. gains: by resource, how much less was reserved than static percentages reserve; unserved: of what
    was demanded; waited: returns that had to wait, in the order of NAMES."""

    gains: dict[str, float]
    unserved: dict[str, float]
    waited: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Verdict:
        ours, room = rows[0], [row for row in rows if row["case"] == "enough room"]
        return cls(
            {r: 1 - ours[f"{r}_reserved"] / at_equal(r, ours[f"{r}_unserved"], room) for r in COUNTED},
            {r: ours[f"{r}_unserved"] / ours[f"{r}_demand"] for r in COUNTED},
            tuple(row["waited"] for row in rows[: len(NAMES)]),
        )

    @property
    def gain(self) -> float:
        return float(np.mean(list(self.gains.values())))


def summary(found: Sequence[Verdict], seconds: float) -> dict[str, float]:
    """Means over the fleets, waits in all."""
    ours, lowest, kept = (sum(v.waited[i] for v in found) for i in range(len(NAMES)))
    return {
        "reserved_vs_static": float(np.mean([v.gain for v in found])),
        "reserved_vs_static_least": min(v.gain for v in found),
        **{f"reserved_vs_static_{r}": float(np.mean([v.gains[r] for v in found])) for r in COUNTED},
        "waiting_restarts_vs_lowest_priority": times(ours, lowest),
        "waiting_restarts_vs_lowest_priority_kept": times(ours, kept),
        "unserved_demand": float(np.mean([list(v.unserved.values()) for v in found])),
        **{f"unserved_demand_{r}": float(np.mean([v.unserved[r] for v in found])) for r in COUNTED},
        "seconds": seconds,
    }


def times(ours: int, theirs: int) -> float:
    """1 where neither has any."""
    return ours / theirs if theirs else float(1 + ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a Parquet or CSV file of series, or the folder with the traces")
    parser.add_argument("--days", type=float, default=DAYS, help="so many of the last days are replayed")
    parser.add_argument("--before", type=float, default=0.0, help="leave out so many of the last days: for choosing")
    parser.add_argument("--vms", type=int, default=VMS)
    parser.add_argument("--fit", type=float, default=FIT)
    parser.add_argument("--seed", type=int, action="append", help="a fleet; again for more (default: 1, 2 and 3)")
    options = parser.parse_args()
    place = traces(options.data)
    file = place / "bitbrains_rnd.parquet" if place.is_dir() else Path(place)
    series = read(file)
    series = series.until((series.slots - round(options.before * DAY)) // DAY * DAY)
    begin = series.slots - round(options.days * DAY)
    say(f"{file.name}: days {begin / DAY:g} to {series.slots / DAY:g}")
    cases: list[dict[str, Any]] = []
    found = []
    for seed in options.seed or SEEDS:
        fleet = fleet_of(series, begin=begin, fit=options.fit, vms=options.vms, seed=seed)
        ample = fleet_of(series, begin=begin, fit=1.0, vms=options.vms, seed=seed)
        say(f"seed {seed}: {len(fleet.members)} VMs on {len(fleet.capacities)} hosts")
        rows = side_by_side(fleet, ample)
        found.append(Verdict.of(rows))
        cases += [{"seed": seed, **row} for row in rows]
    write("replay", summary(found, sum(c["seconds"] for c in cases)), cases)


if __name__ == "__main__":
    try:
        main()
    except HvctlError as e:
        raise SystemExit(f"{e.message}{f' ({e.hint})' if e.hint else ''}") from e
