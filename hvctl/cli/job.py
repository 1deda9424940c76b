"""hvctl job list|run|history|pause|resume"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.render import Column
from hvctl.units import format_seconds

app = typer.Typer(help="What the node daemon does by itself: see, run, pause.", no_args_is_help=True)


def _names(incomplete: str) -> list[str]:
    from hvctl.jobs.catalog import JOBS

    return [n for n in JOBS if n.startswith(incomplete)]


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's name.", autocompletion=_names)]
AnyJob = Annotated[
    str | None,
    typer.Argument(metavar="[JOB]", help="A job's name; none: every automatic action.", autocompletion=_names),
]
LIST = (
    Column("name", "JOB"),
    Column("every", "EVERY", lambda v: f"{v:g} s"),
    Column("paused", "PAUSED", lambda v: v or "no"),
    Column("last", "LAST"),
    Column("state", "STATE"),
    Column("seconds", "TOOK", _seconds),
    Column("detail", "WHAT"),
)
HISTORY = (
    Column("started_at", "STARTED"),
    Column("job", "JOB"),
    Column("state", "STATE"),
    Column("seconds", "TOOK", _seconds),
    Column("by", "BY"),
    Column("detail", "WHAT"),
)


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the jobs with their last run, and what is paused."""
    from hvctl.jobs.catalog import JOBS, pause_of
    from hvctl.operations import node

    options = globals_of(context)
    settings = options.settings()
    last, pauses = node.state(settings)
    data = []
    for job in JOBS.values():
        run, pause = last.get(job.name), pause_of(job, pauses)
        data.append(
            {
                "name": job.name,
                "does": job.does,
                "every": job.every(settings),
                "action": job.action,
                "paused": f"by {pause.who} since {_time(pause.since)}" if pause else None,
                "last": _time(run.started_at) if run else None,
                "state": run.state.value if run else None,
                "seconds": run.seconds if run else None,
                "detail": run.detail if run else None,
            }
        )
    render.rows(options, "jobs", data, LIST)


@app.command()
def run(context: typer.Context, job: JobName) -> None:
    """Run a job now, paused or not: by hand is not by itself."""
    from hvctl.errors import BusyError, HvctlError
    from hvctl.jobs.catalog import ONCE_LONGEST, by_hand, find, perform
    from hvctl.model.job import RunState

    options = globals_of(context)
    found = find(job)
    with options.engine() as engine, by_hand(engine, ONCE_LONGEST) as here:
        done = perform(found, here, engine.who)
    render.rows(options, "runs", [_row(codec.dump(done))], HISTORY)
    if done.state is not RunState.DONE:
        error = BusyError if done.state is RunState.BUSY else HvctlError
        raise error(f"{job}: {done.detail}", "hvctl job history")


@app.command()
def history(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Only this job.", autocompletion=_names)] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="How many, newest first.")] = 50,
) -> None:
    """Show the runs of jobs, newest first. Of quick ones that say the same again and again: the first and the last."""
    from hvctl.jobs.catalog import find
    from hvctl.operations import node

    options = globals_of(context)
    if job is not None:
        find(job)
    runs = node.history(options.settings(), job, limit)
    render.rows(options, "runs", [_row(codec.dump(r)) for r in runs], HISTORY)


def _row(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "started_at": _time(run["started_at"])}


@app.command()
def pause(context: typer.Context, job: AnyJob = None) -> None:
    """Stop a job, or every automatic action; measuring goes on unless it is named. By hand all can be done."""
    from hvctl.jobs.catalog import find
    from hvctl.operations import node

    options = globals_of(context)
    if job is not None:
        find(job)
    node.pause(options.settings(), job)
    options.say(f"paused: {job or 'every automatic action'}")


@app.command()
def resume(context: typer.Context, job: AnyJob = None) -> None:
    """End a pause: that of a job, or that of every automatic action."""
    from hvctl.jobs.catalog import find
    from hvctl.operations import node

    options = globals_of(context)
    if job is not None:
        find(job)
    was = node.resume(options.settings(), job)
    options.say(f"{'resumed' if was else 'was not paused'}: {job or 'every automatic action'}")
