"""hvctl series import|export"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.errors import HvctlError, UsageError
from hvctl.units import parse_duration, parse_moment

app = typer.Typer(help="What VMs used, as files: from elsewhere, and for elsewhere.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="Parquet, or CSV by its name.")]
_TIME = "As in 7d (so long ago), or an RFC 3339 time."


def past(text: str, now: float) -> float:
    """Seconds since 1970 from `7d` (so long before `now`), or from RFC 3339 with a zone."""
    try:
        return now - parse_duration(text)
    except HvctlError:
        pass
    try:
        return parse_moment(text, now)
    except UsageError:
        raise UsageError(f"{text!r} is not a time.", "write 7d, or 2026-01-31T18:00:00Z") from None


@app.command("import")
def import_(context: typer.Context, file: File) -> None:
    """Take five-minute rows of VMs into the record, from which they are forecast and models are trained."""
    from hvctl.operations import series as verbs

    options = globals_of(context)
    with options.engine() as engine:
        moved = verbs.import_file(engine, file)
    if moved.left_out:
        options.say(f"left out: {moved.left_out} rows that are older than what a node keeps, or in the future")
    render.detail(options, "series", asdict(moved), [("taken", f"{moved.rows} rows of {moved.vms} VMs")])


@app.command()
def export(
    context: typer.Context,
    file: File,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help=_TIME)] = "90d",
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help=f"{_TIME} Default: now.")] = None,
) -> None:
    """Write the record of this host's VMs to a file that `model train` and other tools read."""
    from hvctl.operations import series as verbs

    options = globals_of(context)
    now = time.time()
    first, last = past(since, now), None if until is None else past(until, now)
    with options.engine() as engine:
        moved = verbs.export_file(engine, file, first, last)
    render.detail(options, "series", asdict(moved), [("written", f"{moved.rows} rows of {moved.vms} VMs to {file}")])
