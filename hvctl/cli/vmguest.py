"""hvctl vm exec|console: into the guest. What comes out of it reaches a terminal only with its control characters
shown."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import VmName, bounded
from hvctl.cli.output import ReaderGoneError, drop_output
from hvctl.cli.printable import printable
from hvctl.errors import RefusedError, UsageError
from hvctl.units import format_size, parse_size

# libvirt carries requests of 4 MiB, and base64 takes a third more than the bytes.
STDIN_LIMIT = 2 << 20


def exec_(
    context: typer.Context,
    vm: VmName,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The program and its arguments.")],
    timeout: Annotated[float, typer.Option(metavar="SECONDS", callback=bounded, help="How long it may run.")] = 60.0,
    max_output: Annotated[str, typer.Option(metavar="SIZE", help="How much of each stream is kept.")] = "1MiB",
    stdin: Annotated[bool, typer.Option("--stdin", help="Give it this command's standard input.")] = False,
) -> None:
    """Run a program in the guest through its agent; the exit status is the program's."""
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    limit = parse_size(max_output)
    data = sys.stdin.buffer.read(STDIN_LIMIT + 1) if stdin else b""
    if len(data) > STDIN_LIMIT:
        raise UsageError(f"standard input has more than {format_size(STDIN_LIMIT)}.", "copy large data over a network")
    with options.engine() as engine:
        result = verbs.run(engine, vm, command, data, timeout, limit)
    if options.format is Format.TABLE:
        _copy(result.stdout, sys.stdout)
        _copy(result.stderr, sys.stderr)
        if result.truncated:
            options.say(f"warning: output beyond {max_output} a stream was cut")
    else:
        texts = {
            "status": result.status,
            "signal": result.signal,
            "stdout": result.stdout.decode(errors="backslashreplace"),
            "stderr": result.stderr.decode(errors="backslashreplace"),
            "truncated": result.truncated,
        }
        render.detail(options, "exec", texts, ())
    raise typer.Exit(128 + result.signal if result.signal else result.status or 0)


def _copy(data: bytes, stream: Any) -> None:
    """Bytes as they are into a pipe or file; escaped where a terminal would act on them."""
    try:
        if stream.isatty():
            stream.write(printable(data.decode(errors="backslashreplace")))
        else:
            stream.buffer.write(data)
        stream.flush()
    except ReaderGoneError:
        drop_output()  # the exit status is the program's all the same


def console(context: typer.Context, vm: VmName) -> None:
    """Attach to the serial console of a running VM (virsh console; leave it with ^])."""
    import os
    import shutil

    from hvctl.operations import inspect

    settings = globals_of(context).settings()
    found = inspect.vm(settings, vm)
    if not found["console"]:
        raise RefusedError(f"{vm} is {found['state']} and has no console now.", f"hvctl vm start {vm}")
    virsh = shutil.which("virsh")
    if virsh is None:
        raise RefusedError("virsh is not installed.", "apt-get install libvirt-clients")
    # virsh takes the terminal over: an argument list, and nothing of it comes from the guest.
    os.execv(virsh, [virsh, "-c", settings.uri, "console", "--", found["uuid"]])  # noqa: S606
