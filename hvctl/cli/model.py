"""hvctl model train|list|show|evaluate|drift|promote|rollback"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.options import DryRun
from hvctl.cli.render import Column

app = typer.Typer(help="Models of demand: train, judge, use.", no_args_is_help=True)

Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="Series as Parquet or CSV.")]
Name = Annotated[str, typer.Argument(metavar="MODEL", help="A model by name; the shipped one is `shipped`.")]
MaybeName = Annotated[str | None, typer.Argument(metavar="MODEL", help="A model by name (default: the one in use).")]


def _percent(value: Any) -> str:
    return f"{100 * value:+.1f} %"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _factor(value: float) -> str:
    return f"x {value:.3g}"


METRICS = (
    Column("resource", "RESOURCE"),
    Column("target", "TARGET"),
    Column("gain", "GAIN", _percent),
    Column("interval", "INTERVAL", lambda v: f"{_percent(v[0])} to {_percent(v[1])}"),
    Column("gain_composite", "AGAINST ALL RULES", _percent),
    Column("coverage", "COVERAGE", _share),
    Column("baseline", "BEST RULE"),
)
DRIFT = (
    Column("resource", "RESOURCE"),
    Column("target", "TARGET"),
    Column("answered", "BY"),
    Column("answering", "ANSWERS", lambda v: "yes" if v else ""),
    Column("stated", "STATED", _share),
    Column("observed", "OBSERVED", _share),
    Column("cases", "CASES"),
    Column("margin", "MARGIN", _factor),
    Column("vms", "VMS"),
    Column("vm_median", "VM MEDIAN", _factor),
    Column("vm_most", "VM MOST", _factor),
)
CARDS = (
    Column("name", "NAME"),
    Column("current", "IN USE", lambda v: "yes" if v else ""),
    Column("created_at", "MADE"),
    Column("data", "DATA"),
    Column("vms", "VMS"),
    Column("days", "DAYS"),
    Column("gain", "MEAN GAIN", lambda v: "-" if v is None else _percent(v)),
)


@app.command()
def train(
    context: typer.Context,
    data: Data,
    rows: Annotated[int, typer.Option("--rows", min=1000, max=5_000_000, help="Cases to learn from.")] = 160_000,
    seconds: Annotated[int, typer.Option("--seconds", min=10, max=86400, help="The longest it may take.")] = 3600,
) -> None:
    """Train a set of models in a child process with limits; `promote` puts it to use."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    card = verbs.train(options.settings(), data, options.say, rows=rows, seconds=float(seconds))
    options.say(f"model {card.id}: trained, not yet in use (hvctl model promote {card.id} --data {data})")
    render.rows(options, "metrics", [codec.dump(m) for m in card.metrics], METRICS)


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the models there are, and which one is in use."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    current, cards = verbs.listed(options.settings())
    rows = []
    for card in cards:
        gains = [m.gain for m in card.metrics]
        mean = sum(gains) / len(gains) if gains else None
        rows.append({**codec.dump(card), "name": card.id, "current": card.id == current, "gain": mean})
    render.rows(options, "models", rows, CARDS)


@app.command()
def show(context: typer.Context, model: MaybeName = None) -> None:
    """Show a model's card: what it was made from, against which rules it won, and where it does not."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    card = verbs.show(options.settings(), model)
    lines = [
        ("name", card.id),
        ("made", card.created_at),
        ("data", f"{card.data}: {card.vms} VMs, {card.days:g} days, {card.rows} cases"),
        ("features", f"{card.feature_count}, {card.features[:12]}"),
        ("parameters", " ".join(f"{k}={v}" for k, v in card.parameters.items())),
        *(
            (
                f"{m.resource} {m.target}",
                f"{_percent(m.gain)} against {m.baseline}, {_percent(m.gain_composite)} against the best rule of each "
                f"length of history, coverage {100 * m.coverage:.1f} %",
            )
            for m in card.metrics
        ),
        *(("limit", text) for text in card.limits),
    ]
    render.detail(options, "model", codec.dump(card), lines)


@app.command()
def evaluate(context: typer.Context, data: Data, model: MaybeName = None) -> None:
    """Judge a model on the newest days of other VMs, beside the best rules."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    found = verbs.evaluate(options.settings(), data, model)
    render.rows(options, "metrics", [codec.dump(m) for m in found], METRICS)


@app.command()
def drift(context: typer.Context) -> None:
    """Show how the model in use and the rules keep their coverage on this node, and how far their margins moved."""
    from hvctl.operations import compare
    from hvctl.operations.forecast import panel_of

    options = globals_of(context)
    with options.engine() as engine:
        found = compare.drift(engine, panel_of(engine, ()))
    if not found:
        options.say("no forecast was compared with what came yet (hvctl job run forecast)")
    render.rows(options, "drift", [codec.dump(d) for d in found], DRIFT)


@app.command()
def promote(context: typer.Context, model: Name, data: Data, dry_run: DryRun = False) -> None:
    """Use a model from now on; refused unless it beats the one in use and the best rules."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    found = verbs.promote(options.settings(), model, data, dry_run=dry_run)
    options.say(f"model {model}: {'would be' if dry_run else 'is'} in use")
    render.rows(options, "metrics", [codec.dump(m) for m in found], METRICS)


@app.command()
def rollback(context: typer.Context, dry_run: DryRun = False) -> None:
    """Use the model from before the last promotion again."""
    from hvctl.operations import model as verbs

    options = globals_of(context)
    name = verbs.rollback(options.settings(), dry_run=dry_run)
    options.say(f"model {name}: {'would be' if dry_run else 'is'} in use again")
