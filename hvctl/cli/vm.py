"""hvctl vm create|start|stop|delete|adopt|protect|dirty-rate|set, and in which order the help has them all"""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl.cli import render, vmguest, vmshow
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import DryRun, ExitCode, ExitCodeUnlessYes, VmName, bounded, pending
from hvctl.cli.printable import printable
from hvctl.errors import UsageError
from hvctl.units import format_size, parse_size

app = typer.Typer(help="Virtual machines: create, list, start, stop, delete, exec and more.", no_args_is_help=True)


def _disk(text: str) -> tuple[str, int]:
    name, colon, size = text.partition(":")
    if not colon or not name:
        raise UsageError(f"{text!r} is not a disk.", "write NAME:SIZE, such as data:64MiB")
    return name, parse_size(size)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not a label.", "write KEY=VALUE")
    return name, value


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a to z, 0 to 9 and -, at most 63.")],
    image: Annotated[str, typer.Option(metavar="IMAGE", help="The base image: micro or debian.")],
    vcpus: Annotated[int, typer.Option(metavar="N", help="vCPUs at the start.")] = 1,
    max_vcpus: Annotated[int | None, typer.Option(metavar="N", help="The most it can ever have (default 4).")] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory at the start.")] = "256MiB",
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most it can ever have (default 1GiB).")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:SIZE", help="A data disk; may be repeated; none for no disk. Default: the image's."),
    ] = None,
    nic: Annotated[
        list[str] | None, typer.Option(metavar="BRIDGE", help="A NIC on a bridge; may be repeated; none for no NIC.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label; may be repeated.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Create a VM from an image: thin overlays over its read-only base, ready for warm resets.

    Its disks are throw-away: they are flushed to the host only when the host pleases.
    """
    from hvctl.operations import vm as verbs

    size = parse_size(memory)
    asked = [] if disk is None else [d for d in disk if d != "none"]
    new = verbs.NewVm(
        name=name,
        image=image,
        vcpus=vcpus,
        max_vcpus=max(4, vcpus) if max_vcpus is None else max_vcpus,
        memory=size,
        max_memory=max(1 << 30, size) if max_memory is None else parse_size(max_memory),
        disks=None if disk is None else tuple(_disk(d) for d in asked),
        bridges=tuple(n for n in nic or () if n != "none"),
        labels=dict(_label(text) for text in label or ()),
        start=start,
    )
    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.create(engine, new, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


app.command("list")(vmshow.list_)
app.command()(vmshow.show)


@app.command()
def start(context: typer.Context, vm: VmName, dry_run: DryRun = False, exit_code: ExitCode = False) -> None:
    """Start a VM with what was promised to it, bandwidth included, if the host has room."""
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.start(engine, vm, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command()
def stop(
    context: typer.Context,
    vm: VmName,
    force: Annotated[bool, typer.Option("--force", help="End the QEMU process instead of asking the guest.")] = False,
    seconds: Annotated[float, typer.Option(metavar="N", callback=bounded, help="How long the guest may take.")] = 30.0,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Stop a VM by asking its guest to power off. Its snapshots go: they live in the QEMU process."""
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.stop(engine, vm, force=force, seconds=seconds, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command()
def delete(
    context: typer.Context,
    vm: VmName,
    force: Annotated[bool, typer.Option("--force", help="Also when it runs.")] = False,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Delete a VM that hvctl created: its definition, its disks, its snapshots, its shaping."""
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.delete(engine, vm, force=force, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


app.command("exec")(vmguest.exec_)
app.command()(vmguest.console)


@app.command()
def adopt(
    context: typer.Context,
    vm: VmName,
    yes: Annotated[bool, typer.Option("--yes", help="Apply it; without, the change is only shown.")] = False,
    exit_code: ExitCodeUnlessYes = False,
) -> None:
    """Show, and with --yes apply, the XML change that a foreign domain needs for warm resets."""
    from hvctl.operations import inspect
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        changes = inspect.adoption_diff(engine, vm)
        result = verbs.adopt(engine, vm, dry_run=not yes, key=options.key)
    if options.format is Format.TABLE and changes:
        print(printable(changes))
    render.outcome(options, result)
    pending(result, exit_code)


@app.command()
def protect(
    context: typer.Context,
    vm: VmName,
    off: Annotated[bool, typer.Option("--off", help="Take the protection away.")] = False,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Protect a VM: hvctl then refuses to stop, reset or delete it."""
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.protect(engine, vm, not off, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command("dirty-rate")
def dirty_rate(
    context: typer.Context,
    vm: VmName,
    seconds: Annotated[int, typer.Option(metavar="N", min=1, max=60, help="How long to look.")] = 1,
) -> None:
    """Measure how fast a running VM writes to its memory, which is what snapshots and resets of it cost."""
    from hvctl.operations import collect

    options = globals_of(context)
    with options.engine() as engine:
        data = collect.dirty_rate(engine, vm, seconds)
    rate = format_size(int(data["dirty_bytes_per_second"]))
    render.detail(options, "dirty_rate", data, [("vm", data["vm"]), ("dirtied", f"{rate}/s over {seconds} s")])


@app.command("set")
def set_(
    context: typer.Context,
    vm: VmName,
    priority: Annotated[int | None, typer.Option(metavar="N", help="0 to 1000; lower goes first.")] = None,
    interruptible: Annotated[
        bool | None, typer.Option("--interruptible/--no-interruptible", help="May it be interrupted for others?")
    ] = None,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Set a VM's priority, and whether its resources may be taken back while it runs (hvctl interrupt)."""
    if priority is None and interruptible is None:
        raise UsageError("set was not told what to set.", "hvctl vm set VM --priority 300 --interruptible")
    from hvctl.operations import vm as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.configure(
            engine, vm, priority=priority, interruptible=interruptible, dry_run=dry_run, key=options.key
        )
    render.outcome(options, result)
    pending(result, exit_code)
