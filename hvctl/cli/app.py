"""The root command: flags for every command, and the groups."""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl import __version__
from hvctl.cli import (
    allocate,
    forecast,
    host,
    image,
    interrupt,
    job,
    model,
    node,
    operation,
    pool,
    profile,
    replay,
    series,
    snapshot,
    top,
    vm,
)
from hvctl.cli.context import Format, Globals

app = typer.Typer(
    name="hvctl",
    help="Live allocation and warm resets for KVM/QEMU virtual machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(vm.app, name="vm")
app.add_typer(image.app, name="image")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(model.app, name="model")
app.add_typer(series.app, name="series")
app.add_typer(profile.app, name="profile")
app.add_typer(operation.app, name="operation")
app.add_typer(host.app, name="host")
app.add_typer(node.app, name="node")
app.add_typer(job.app, name="job")
app.add_typer(pool.app, name="pool")
app.add_typer(pool.reserve, name="reserve")
app.add_typer(host.config, name="config")
app.command("allocate")(allocate.allocate)
app.command("reset")(snapshot.reset)
app.command("interrupt")(interrupt.interrupt)
app.command("resume")(interrupt.resume)
app.command("recover")(operation.recover)
app.command("doctor")(host.doctor)
app.command("forecast")(forecast.forecast)
app.command("replay")(replay.replay)
app.command("top")(top.top)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hvctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    connect: Annotated[
        str | None, typer.Option("--connect", "-c", metavar="URI", help="The hypervisor (default qemu:///system).")
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="How data is printed.")] = Format.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No remarks on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say each step on stderr.")] = False,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="TEXT", help="Idempotency key: a repeated request gives the first answer."),
    ] = None,
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _v: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = Globals(connect, form, quiet, verbose, key)
