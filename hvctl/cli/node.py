"""hvctl node run"""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.render import Column
from hvctl.units import format_seconds

app = typer.Typer(help="The node daemon: measures VMs, recovers, mends.", no_args_is_help=True)

RUNS = (
    Column("job", "JOB"),
    Column("state", "STATE"),
    Column("seconds", "TOOK", format_seconds),
    Column("detail", "WHAT"),
)


@app.command()
def run(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Run what is due and end: for cron and timers.")] = False,
) -> None:
    """Run the jobs of this host in the foreground until SIGTERM. Exit 7 if another daemon does."""
    options = globals_of(context)
    if not once:
        from hvctl.jobs import daemon

        daemon.run(options.settings(), options.say)
        return
    from hvctl.errors import HvctlError
    from hvctl.jobs.once import run_due
    from hvctl.model.job import RunState

    with options.engine() as engine:
        runs = run_due(engine, options.progress)
    render.rows(options, "runs", [codec.dump(r) for r in runs], RUNS)
    if failed := [r.job for r in runs if r.state is RunState.FAILED]:
        raise HvctlError(f"failed: {', '.join(failed)}.", "hvctl job history")
