"""hvctl replay"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.render import Column
from hvctl.units import format_duration, parse_duration

UNITS = {"cpu": "core-s", "memory": "GiB-s"}
COLUMNS = (
    Column("policy", "POLICY"),
    Column("interruptions", "INTERRUPTED"),
    Column("returns", "RETURNED"),
    Column("waited", "HAD TO WAIT"),
    Column("wait_mean", "MEAN WAIT", format_duration),
    *(Column(f"{r}_unserved", f"{r.upper()} UNSERVED") for r in UNITS),
    *(Column(f"{r}_unused", f"{r.upper()} RESERVED UNUSED") for r in UNITS),
    Column("guard", "GUARD ACTED"),
)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Amounts with their unit, and as shares of what was demanded or reserved."""
    texts = {}
    for resource, unit in UNITS.items():
        for name, whole in (("unserved", "demand"), ("unused", "reserved")):
            amount, of = row[f"{resource}_{name}"], row[f"{resource}_{whole}"]
            texts[f"{resource}_{name}"] = f"{amount:,.0f} {unit} ({amount / of if of else 0:.1%})"
    looks, actions = row["guard_looks"], row["guard_actions"]
    guard = f"{', '.join(f'{act} {n:,}' for act, n in actions.items()) or 0} at {looks:,} looks" if looks else None
    return row | texts | {"guard": guard}


def replay(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Parquet, or CSV by its name.")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", metavar="POLICY", help="A shipped one or a file; again for more.")
    ] = None,
    fit: Annotated[
        float, typer.Option("--fit", metavar="X", help="The share of their VMs' sizes that hosts have.")
    ] = 0.6,
    hosts: Annotated[int | None, typer.Option("--hosts", metavar="N", help="Default: one for 30 VMs.")] = None,
    vms: Annotated[
        int | None, typer.Option("--vms", metavar="N", help="So many of the trace's (default: all).")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Draws VMs, priorities, who is guaranteed.")
    ] = 1,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="DURATION", help="The trace up to here is history (default: 7d or a quarter)."),
    ] = None,
    lasts: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="How much is replayed (default: the rest).")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Without the model: it was made from this trace.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: a file that ends with .svg or .png.")
    ] = None,
) -> None:
    """See what policies would do with a recorded trace on simulated hosts, before one is armed.

    Lowest-priority-first and static percentages stand beside them. No host is touched.
    """
    from hvctl.operations import replay as verbs
    from hvctl.operations.replaypolicy import chosen

    options = globals_of(context)
    verbs.check_plot(plot)
    policies = chosen(policy or ["forecast"])
    scene = verbs.Scene(
        trace, fit, hosts, vms, seed, None if after is None else parse_duration(after),
        None if lasts is None else parse_duration(lasts), rules,
    )  # fmt: skip
    compared = verbs.compare(options.settings(), scene, policies, options.progress)
    document = compared.document(scene)
    if plot is not None:
        verbs.plot(compared, plot)
    if options.format in (Format.JSON, Format.YAML):
        render.detail(options, "replay", document, ())
        return
    options.say(
        f"{document['vms']} VMs ({document['guaranteed']} guaranteed) on {document['hosts']} hosts that fit "
        f"{fit:.0%} of their sizes, {format_duration(document['seconds'])} from {document['start']}; "
        f"forecasts by {document['forecasts']}"
    )
    if options.format is Format.CSV:
        render.rows(options, "policies", document["policies"], [Column(n, n) for n in document["policies"][0]])
    else:
        render.rows(options, "policies", [_row(row) for row in document["policies"]], COLUMNS)
