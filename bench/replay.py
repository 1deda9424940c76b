"""bench-replay: 300 VMs of a recorded trace on hosts that fit 60 % of their sizes, allocated by forecast, beside the
lowest priorities first and beside static percentages. Writes build/bench/replay.json.

The last days of the trace are replayed. The rules and their margins are chosen on the days before; no model is asked,
since the shipped one was made from this trace. What a static percentage would have to reserve is taken from hosts that
fit everything, where it is never short of room: on the same hosts it could only serve less."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from forecast import traces
from report import say, write

from hvctl.adapters.seriesfile import read
from hvctl.errors import HvctlError
from hvctl.forecasting.forecast import Panel, key_of
from hvctl.forecasting.rulebook import Rulebook, composite
from hvctl.forecasting.series import FLOOR, Series
from hvctl.forecasting.trial import DAY, QUANTILE, hourly, part
from hvctl.operations.replaypolicy import load
from hvctl.replay.fleet import COUNTED, Fleet, fleet_of
from hvctl.replay.policy import Policy
from hvctl.replay.run import replay

VMS: Final = 300
FIT: Final = 0.6
DAYS: Final = 7
TUNED: Final = 28
"""Days before those that are replayed on which the rules are chosen."""
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
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    place = traces(options.data)
    file = place / "bitbrains_rnd.parquet" if place.is_dir() else Path(place)
    series = read(file)
    series = series.until((series.slots - round(options.before * DAY)) // DAY * DAY)
    begin = series.slots - round(options.days * DAY)
    fleet = fleet_of(series, begin=begin, fit=options.fit, vms=options.vms, seed=options.seed)
    ample = replace(
        fleet, capacities=fleet_of(series, begin=begin, fit=1.0, vms=options.vms, seed=options.seed).capacities
    )
    panel = Panel(book(fleet.series, begin), missing="the shipped model was made from this trace")
    days = f"days {begin / DAY:g} to {series.slots / DAY:g}"
    say(f"{file.name}: {len(fleet.members)} VMs on {len(fleet.capacities)} hosts, {days}")
    ours, lowest, kept = (
        told(fleet, load(n), panel, "same hosts") for n in ("forecast", "lowest-priority-first", "lowest-priority-kept")
    )
    static = load("static")
    cases = [ours, lowest, kept]
    cases += [told(fleet, replace(static, percent=p), panel, "same hosts") for p in SAME_HOSTS]
    room = [told(ample, replace(static, percent=p), panel, "enough room") for p in ENOUGH_ROOM]
    gains = {r: 1 - ours[f"{r}_reserved"] / at_equal(r, ours[f"{r}_unserved"], room) for r in COUNTED}
    write(
        "replay",
        {
            "reserved_vs_static": float(np.mean(list(gains.values()))),
            **{f"reserved_vs_static_{r}": gain for r, gain in gains.items()},
            "waiting_restarts_vs_lowest_priority": times(ours["waited"], lowest["waited"]),
            "waiting_restarts_vs_lowest_priority_kept": times(ours["waited"], kept["waited"]),
            "unserved_demand": float(np.mean([ours[f"{r}_unserved"] / ours[f"{r}_demand"] for r in COUNTED])),
            "seconds": sum(c["seconds"] for c in (*cases, *room)),
        },
        [*cases, *room],
    )


if __name__ == "__main__":
    try:
        main()
    except HvctlError as e:
        raise SystemExit(f"{e.message}{f' ({e.hint})' if e.hint else ''}") from e
