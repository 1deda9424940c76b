"""hvctl forecast"""

from __future__ import annotations

import re
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import VmName
from hvctl.cli.render import Column
from hvctl.cli.series import past
from hvctl.errors import UsageError
from hvctl.units import format_duration, format_time, parse_duration


class Horizon(StrEnum):
    HALF_AN_HOUR = "30m"
    AN_HOUR = "60m"


def minutes(text: str) -> int:
    """Seconds from `30m`, or from what every duration is written like."""
    return round(parse_duration(re.sub(r"(?<=[0-9])m$", "min", text)))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


LINES = (
    Column("resource", "RESOURCE"),
    Column("peak_text", "PEAK"),
    Column("mean_text", "MEAN"),
    Column("quantile", "QUANTILE", lambda v: f"{v:g}"),
    Column("coverage", "COVERED", _share),
    Column("came_text", "CAME"),
    Column("answered", "ANSWERED"),
    Column("rule", "RULE"),
    Column("history", "SEEN", lambda v: format_duration(v)),
    Column("model_text", "MODEL"),
    Column("reason", "WHY"),
)
EXPLAINED = (
    Column("resource", "RESOURCE"),
    Column("name", "FEATURE"),
    Column("value", "VALUE", lambda v: "unknown" if v is None else f"{v:.3g}"),
    Column("usual", "USUALLY", lambda v: "unknown" if v is None else f"{v:.3g}"),
    Column("gain", "GAIN", _share),
    Column("change", "PEAK IF USUAL", lambda v: f"{v:+.3g}"),
)
PLAIN = ("resource", "unit", "peak", "mean", "quantile", "horizon", "gap", "coverage", "answered", "rule",
         "mean_answered", "mean_rule", "history", "model", "model_age", "actual_peak", "actual_mean",
         "reason")  # fmt: skip


def forecast(
    context: typer.Context,
    vm: VmName,
    horizon: Annotated[Horizon, typer.Option("--horizon", help="The time that is forecast.")] = Horizon.AN_HOUR,
    after_interruption: Annotated[
        bool, typer.Option("--after-interruption", help="For the time after it was off and started anew.")
    ] = False,
    gap: Annotated[
        str | None, typer.Option("--gap", metavar="DURATION", help="How long it is off until then (default 30m).")
    ] = None,
    quantile: Annotated[
        float, typer.Option("--quantile", metavar="Q", help="The share of cases that stay below: 0.5 to 0.99.")
    ] = 0.95,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="As it would have been then (1d ago, or RFC 3339), with what came."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also which features moved the model, and what the best rule says.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: a file that ends with .svg or .png.")
    ] = None,
) -> None:
    """Forecast the demand of a VM: peak and mean of each resource, how sure that is, and who says so."""
    from hvctl.operations import forecast as verbs

    if gap is not None and not after_interruption:
        raise UsageError("a gap is the time of an interruption.", "add --after-interruption")
    wait = 0 if not after_interruption else verbs.GAP if gap is None else minutes(gap)
    moment = None if at is None else past(at, time.time())
    options = globals_of(context)
    with options.engine() as engine:
        if plot is not None:
            from hvctl.adapters.models import plot as pictures

            pictures.check(plot)
        told = verbs.forecast_vm(
            engine, vm, verbs.Question(minutes(horizon.value), wait, quantile, after_interruption, moment)
        )
        if plot is not None:
            verbs.plot(engine, told, plot)
    document = told.document()
    reasons = []
    if explain:
        from hvctl.operations.explain import explain as explained

        reasons = [codec.dump(e) for e in explained(told)]
        document["explanation"] = reasons
    if options.format in (Format.JSON, Format.YAML):
        render.detail(options, "forecast", document, ())
    elif options.format is Format.CSV:
        render.rows(options, "forecast", document["resources"], [Column(n, n) for n in PLAIN])
    else:
        _show(options, document, reasons)


def _show(options: Any, document: dict[str, Any], reasons: list[dict[str, Any]]) -> None:
    options.say(f"{document['vm']} as of {format_time(document['made_at'])}")
    render.rows(options, "forecast", [_row(line) for line in document["resources"]], LINES)
    for one in reasons:
        own = "says nothing" if one["model_peak"] is None else f"says {one['model_peak']:.3g}"
        at = "" if one["model_quantile"] == document["quantile"] else f" at {one['model_quantile']:g}"
        rule = f"{one['rule']} {one['rule_peak']:.3g} {one['unit']}"
        print(f"\n{one['resource']}: the model {own} {one['unit']}{at}, {rule}")
        if one["features"]:
            render.rows(options, "features", [{**f, "resource": one["resource"]} for f in one["features"]], EXPLAINED)


def _row(line: dict[str, Any]) -> dict[str, Any]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g} {line['unit']}"

    age = line["model_age"]
    model = "-" if line["model"] is None else f"{line['model']}, {age / 86400:.1f} days old"
    return {
        **line,
        "peak_text": text(line["peak"]),
        "mean_text": text(line["mean"]),
        "came_text": text(line["actual_peak"]),
        "model_text": model,
    }
