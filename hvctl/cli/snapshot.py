"""hvctl snapshot take|list|show|delete, hvctl reset"""

from __future__ import annotations

from typing import Annotated

import typer

from hvctl.cli import render
from hvctl.cli.complete import snapshot_names
from hvctl.cli.context import globals_of
from hvctl.cli.options import DryRun, ExitCode, SnapshotName, VmName, pending
from hvctl.cli.render import Column
from hvctl.units import format_size

app = typer.Typer(help="Snapshots of running VMs: take, list, show, delete.", no_args_is_help=True)


@app.command()
def take(
    context: typer.Context,
    vm: VmName,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Default: the time.")] = None,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Take a snapshot of a running VM: RAM, devices and all writable disks. It lives as long as the QEMU process."""
    from hvctl.operations import snapshot as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.take(engine, vm, name, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command("list")
def list_(context: typer.Context, vm: VmName) -> None:
    """List a VM's snapshots, and whether each still fits it."""
    from hvctl.operations import inspect

    options = globals_of(context)
    data = inspect.snapshots(options.settings(), vm)
    render.rows(
        options,
        "snapshots",
        data,
        (
            Column("name", "NAME"),
            Column("created_at", "CREATED"),
            Column("stored", "STORED", format_size),
            Column("vcpus", "VCPUS"),
            Column("status", "STATUS"),
            Column("id", "ID"),
        ),
    )


@app.command()
def show(context: typer.Context, vm: VmName, name: SnapshotName) -> None:
    """Show one snapshot: what it is bound to, what it takes, and whether it still fits."""
    from hvctl.operations import inspect

    options = globals_of(context)
    data = inspect.snapshot(options.settings(), vm, name)
    process = data["binding"]["process"]
    lines = [
        ("name", data["name"]),
        ("id", data["id"]),
        ("created", data["created_at"]),
        ("status", data["status"]),
        ("process", f"pid {process['pid']}"),
        ("vcpus", str(data["vcpus"])),
        ("balloon", format_size(data["balloon"])),
        ("stored", f"{format_size(data['stored'])} of {format_size(data['ram_size'])} RAM"),
        ("disks", ", ".join(data["nodes"]) or "-"),
        ("devices", f"{len(data['binding']['devices'])} bound"),
    ]
    render.detail(options, "snapshot", data, lines)


@app.command()
def delete(
    context: typer.Context, vm: VmName, name: SnapshotName, dry_run: DryRun = False, exit_code: ExitCode = False
) -> None:
    """Delete a snapshot and wipe what it held."""
    from hvctl.operations import snapshot as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.delete(engine, vm, name, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


def reset(
    context: typer.Context,
    vm: VmName,
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="The snapshot to return to.", autocompletion=snapshot_names)
    ],
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Return a running VM to a snapshot inside the same QEMU process; what it did since is gone."""
    from hvctl.operations import snapshot as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.reset(engine, vm, to, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)
