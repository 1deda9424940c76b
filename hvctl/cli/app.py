"""The root command: flags for every command, and the groups."""

from __future__ import annotations

from typing import Annotated, ClassVar

import typer

from hvctl import __version__
from hvctl.cli.context import Format, Globals
from hvctl.cli.lazy import LazyGroup


class Root(LazyGroup):
    """In the order of the help."""

    places: ClassVar = {
        "allocate": "allocate.allocate",
        "reset": "snapshot.reset",
        "interrupt": "interrupt.interrupt",
        "resume": "interrupt.resume",
        "guard": "guard.guard",
        "explain": "explain.explain",
        "recover": "operation.recover",
        "doctor": "host.doctor",
        "forecast": "forecast.forecast",
        "replay": "replay.replay",
        "top": "top.top",
        "vm": "vm.app",
        "image": "image.app",
        "snapshot": "snapshot.app",
        "model": "model.app",
        "series": "series.app",
        "profile": "profile.app",
        "operation": "operation.app",
        "host": "host.app",
        "node": "node.app",
        "job": "job.app",
        "pool": "pool.app",
        "reserve": "pool.reserve",
        "config": "host.config",
    }


app = typer.Typer(
    cls=Root,
    name="hvctl",
    help="Live allocation and warm resets for KVM/QEMU virtual machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
