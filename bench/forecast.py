"""bench-forecast: models against tuned rules on VMs and days that neither has seen, a fleet that the models were not
made for, and the time it takes. Writes build/bench/forecast.json."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from forecastlab import TARGETS, Verdict, judge
from forecastmodels import Taught, shipped, teach
from forecastplanet import planet
from report import say, write

from hvctl.adapters.models.seriesfile import read
from hvctl.errors import HvctlError, UsageError
from hvctl.forecasting.features import FEATURES, features
from hvctl.forecasting.lessons import drawn
from hvctl.forecasting.series import RESOURCES, Cases, Series
from hvctl.forecasting.trial import DAY, split
from hvctl.forecasting.trial import QUANTILE as Q

SPLIT: Final = "60/15/25@66/78"
ROWS: Final = 200_000
HERE: Final = Path(__file__).resolve().parent.parent


def traces(given: str | None) -> Path:
    """The folder with the traces: as given, HVCTL_TRACES, or beside this checkout or the one it is a worktree of."""
    for place in (given, os.environ.get("HVCTL_TRACES")):
        if place:
            return Path(place)
    near = [HERE.parent / "shared" / "traces"]
    git = HERE / ".git"
    if git.is_file():
        main = Path(git.read_text().removeprefix("gitdir:").strip()).parents[2]
        near.append(main.parent / "shared" / "traces")
    return next((p for p in near if p.is_dir()), near[0])


def shares(text: str) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """VMs for training/calibration/test @ the time at which training/calibration end, in percent: 60/15/25@66/78."""
    try:
        (a, b, c), (d, e) = ([float(n) for n in part.split("/")] for part in text.split("@"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no split.", "write shares of VMs and days, as in 60/15/25@66/78") from error
    if min(a, b, c) < 0 or a + b + c > 100 or not 0 <= d < e < 100:
        raise UsageError(f"{text!r} is no split.", "write shares of VMs and days, as in 60/15/25@66/78")
    return (a, b, c), (d, e)


def seconds_10k(series: Series, models: Taught) -> tuple[float, list[dict[str, Any]]]:
    """10,000 VMs with a week of samples of four resources: features and both quantiles, on one core."""
    resources = [r for r in RESOURCES if r in series.values]
    rng = np.random.default_rng(3)
    week = 2016
    vm = rng.integers(0, len(series.vms), 10_000)
    first = rng.integers(0, max(1, series.slots - week), 10_000)
    values, sizes = {}, {}
    for resource in resources:
        view = np.lib.stride_tricks.sliding_window_view(series.values[resource], min(week, series.slots), axis=1)
        values[resource] = np.ascontiguousarray(view[vm, np.minimum(first, view.shape[1] - 1)])
        sizes[resource] = series.size(resource)[vm]
    fleet = Series(tuple(str(i) for i in range(10_000)), series.start, values, sizes)
    cases = Cases.now(10_000, fleet.slots, 0, 12, week)
    made_in = told_in = 0.0
    for resource in resources:
        began = time.perf_counter()
        made = features(fleet, resource, cases)
        made_in += time.perf_counter() - began
        began = time.perf_counter()
        for quantile in (0.5, Q):
            made.value(models.answer(f"{resource}-peak-{quantile:g}", made.x))
        told_in += time.perf_counter() - began
    rows = 10_000 * len(resources)
    return made_in + told_in, [
        {"case": "features of 10,000 VMs", "seconds": made_in, "rows_per_s": rows / made_in, "features": len(FEATURES)},
        {"case": "predictions for 10,000 VMs", "seconds": told_in, "rows_per_s": 2 * rows / told_in},
        {"case": "features per second", "features_per_s": rows * len(FEATURES) / made_in},
        {"case": "models", "models": len(models.sizes), "bytes": sum(models.sizes.values())},
    ]


def summary(verdicts: dict[tuple[str, str], Verdict], regret: float, seconds: float, taught: float) -> dict[str, float]:
    main = [v for (_, target), v in verdicts.items() if target == "peak60"]
    return {
        "pinball_gain_mean": float(np.mean([v.gain for v in main])),
        "reserved_gain_mean": float(np.mean([v.reserved_gain for v in main])),
        "pinball_gain_worst": min(v.gain for v in main),
        "pinball_gain_composite": float(np.mean([v.gain_composite for v in main])),
        "coverage_error_max": max(abs(v.coverage - Q) for v in main),
        "vm_coverage_p10_min": min(v.vm_coverage_p10 for v in main),
        "transfer_regret": regret,
        "seconds_10k_vms": seconds,
        "train_seconds": taught,
    }


def means(verdicts: dict[tuple[str, str], Verdict]) -> dict[str, Any]:
    """Beside the summary: the same gains if the opponents keep the fixed margin of their calibration."""
    rows = [v.row for (_, target), v in verdicts.items() if target == "peak60"]
    names = ("gain_against_fixed_margin", "gain_composite_against_fixed_margins", "gain_composite_of_arbiter")
    return {"case": "peak60, mean of all resources", **{n: float(np.mean([r[n] for r in rows])) for n in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a Parquet or CSV file of series, or the folder with the traces")
    parser.add_argument("--split", default=SPLIT, help="VMs for training/calibration/test @ days in percent")
    parser.add_argument("--planetlab", help="PlanetLab's file (default: beside the data)")
    parser.add_argument("--rows", type=int, default=ROWS, help="training cases")
    parser.add_argument("--shipped", action="store_true", help="judge the shipped models instead of training")
    options = parser.parse_args()
    place = traces(options.data)
    file = place / "bitbrains_rnd.parquet" if place.is_dir() else place
    series = read(file)
    sp = split(series, *shares(options.split))
    say(
        f"{file.name}: {len(series.vms)} VMs, {series.slots / DAY:.1f} days; {len(sp.train)} train, test {len(sp.test)}"
    )
    if options.shipped or not len(sp.train):
        models = shipped()
    else:
        models = teach(series, drawn(sp.train, 0, sp.train_end, options.rows), say)
    cases: list[dict[str, Any]] = []
    verdicts: dict[tuple[str, str], Verdict] = {}
    for resource in (r for r in RESOURCES if r in series.values):
        for target in TARGETS:
            v = verdicts[resource, target] = judge(series, sp, resource, target, models)
            cases += [v.row, *v.by_history, *v.baselines]
            say(
                f"{resource} {target}: {v.gain:+.1%} against {v.best}, {v.gain_composite:+.1%} against the composite, "
                f"coverage {v.coverage:.3f}, p10 {v.vm_coverage_p10:.3f}, reserved {v.reserved_gain:+.1%}"
            )
    cases.append(means(verdicts))
    # One core, whatever the libraries would use.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    seconds, lines = seconds_10k(series, models)
    os.sched_setaffinity(0, cores)
    cases += lines
    other = Path(options.planetlab) if options.planetlab else traces(None) / "planetlab_cpu.parquet"
    regret = float("nan")
    if other.is_file():
        regret, lines = planet(read(other), models, say)
        cases += lines
    write("forecast", summary(verdicts, regret, seconds, models.seconds), cases)


if __name__ == "__main__":
    try:
        main()
    except HvctlError as e:
        raise SystemExit(f"{e.message}{f' ({e.hint})' if e.hint else ''}") from e
