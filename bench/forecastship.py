"""Makes the shipped models in models/: the parameters of the benchmark on all VMs and days, with the benchmark's own
figures (of VMs and days that its models had not seen) on the card. Run it after bench/forecast.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from forecastmodels import shipped, teach
from report import say

from hvctl.adapters.models.modelstore import SHIPPED, write_set
from hvctl.adapters.models.seriesfile import read
from hvctl.forecasting.features import FEATURES, feature_hash
from hvctl.forecasting.lessons import PARAMETERS, PRICING, drawn
from hvctl.forecasting.panel import voice
from hvctl.forecasting.rulebook import Rulebook, composite
from hvctl.forecasting.series import FLOOR, Series
from hvctl.forecasting.trial import DAY, QUANTILE, hourly, part
from hvctl.model.forecast import Answerer, Level, Metric, ModelCard
from hvctl.operations.model import limits

HERE = Path(__file__).resolve().parent.parent
ROWS = 160_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the file of series")
    parser.add_argument("--source", required=True, help="what to call the data on the card")
    parser.add_argument("--rows", type=int, default=ROWS, help="training cases")
    parser.add_argument("--card", action="store_true", help="make the card alone, for the models that are there")
    options = parser.parse_args()
    report = json.loads((HERE / "build" / "bench" / "forecast.json").read_text())
    rows = [r for r in report["cases"] if r["case"] == "model"]
    series = read(options.data)
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if options.card:
        taught = shipped()
        now = taught.boosters.card.created_at  # the models are as old as they were
    else:
        taught = teach(series, drawn(np.arange(len(series.vms)), 0, series.slots, options.rows), say)
    metrics = tuple(
        Metric(
            resource=r["resource"],
            target=r["target"],
            pinball=r["pinball"],
            baseline=r["baseline"],
            baseline_pinball=r["pinball"] / (1 - r["gain"]),
            gain=r["gain"],
            interval=tuple(r["gain_interval"]),
            gain_composite=r["gain_composite"],
            coverage=r["coverage"],
        )
        for r in rows
    )
    shifts = {
        f"{r['resource']}-{r['target'][:4]}-{QUANTILE:g}": float(np.log(r["shift"]))
        for r in rows
        if r["target"][4:] == "60"
    }
    spreads = {
        voice: tuple(Level(*level) for level in levels)
        for r in rows
        if r["target"][4:] == "60"
        for voice, levels in r["spreads"].items()
    }
    card = ModelCard(
        id=SHIPPED,
        created_at=now,
        data=options.source,
        vms=len(series.vms),
        days=round(series.slots / DAY, 1),
        rows=options.rows,
        features=feature_hash(),
        feature_count=len(FEATURES),
        parameters={**PARAMETERS, "pricing": PRICING},
        files={},
        metrics=metrics,
        shifts=shifts,
        spreads=spreads,
        rates={
            voice(Answerer.MODEL, r["resource"], r["target"][:4]): tuple(r["online_rates"]["model"])
            for r in rows
            if r["target"][4:] == "60"
        },
        rulebook={
            k: {h: (str(r), str(m), float(a)) for h, (r, m, a) in v.items()} for k, v in book(series).dump().items()
        },
    )
    more = (
        "the gains are those of models with the same parameters, trained on the benchmark's training part alone and "
        "judged on VMs and days that they had not seen; the shipped ones are trained on all of it",
        "the parameters and the design of the margins were chosen with the benchmark's test part in sight: expect some "
        "points less on fresh data",
        *new_vms(report["cases"]),
    )
    write_set(HERE / "models", replace(card, limits=(*more, *limits(card, list(metrics)))), taught.texts)
    x = np.random.default_rng(11).normal(0, 1.5, (5, len(FEATURES))).astype(np.float32)
    golden = {key: [round(float(v), 7) for v in taught.answer(key, x)] for key in sorted(taught.texts)}
    (HERE / "tests" / "golden" / "forecasts.json").write_text(json.dumps(golden, indent=1) + "\n")


def new_vms(cases: list[dict[str, Any]]) -> list[str]:
    return [
        f"{c['resource']} {c['target']}, {c['case']}: loses {-c['gain_composite']:.0%} to the best rule for that length"
        for c in cases
        if c["case"].startswith("model with") and c["gain_composite"] <= 0
    ]


def book(series: Series) -> Rulebook:
    """Rules and margins from all VMs and days, for both quantiles."""
    choices = {}
    cases = hourly(np.arange(len(series.vms)), 0, series.slots, 12, 9, 12 * 24)
    for resource in series.values:
        for target in ("peak", "mean"):
            p = part(series, resource, cases, peak=target == "peak")
            for q in (0.5, QUANTILE):
                key = f"{resource}-{target}-{q:g}"
                choices[key] = composite(p.actual, p.rules, q, p.scale, p.known, FLOOR[resource], p.cases.history)
    return Rulebook(choices)


if __name__ == "__main__":
    main()
