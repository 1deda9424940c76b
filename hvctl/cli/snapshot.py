"""hvctl snapshot take|list|show|delete|save|load|diff, hvctl reset"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.complete import snapshot_names
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import DryRun, ExitCode, SnapshotName, VmName, pending
from hvctl.cli.render import Column
from hvctl.decide.scope import PARTS, parse_range
from hvctl.model.archive import Difference
from hvctl.model.tracker import TrackerKind
from hvctl.units import format_seconds, format_size

app = typer.Typer(help="Snapshots of running VMs: take, list, show, diff, delete; save, load.", no_args_is_help=True)
SHOWN = 5


@app.command()
def take(
    context: typer.Context,
    vm: VmName,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Default: the time.")] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(metavar="BASE-END", help="Guest-physical memory that an application in the guest owns."),
    ] = None,
    tracker: Annotated[TrackerKind, typer.Option(help="How writes are noted from now on.")] = TrackerKind.AUTO,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Take a snapshot of a running VM: RAM, devices and all writable disks. It lives as long as the QEMU process."""
    from hvctl.operations import snapshot as verbs

    options = globals_of(context)
    with options.engine() as engine:
        owned = [parse_range(word, word) for word in own or []]
        result = verbs.take(engine, vm, name, owned=owned, tracker=tracker, dry_run=dry_run, key=options.key)
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
        ("stored", f"{format_size(data['stored'])} of {format_size(sum(r['size'] for r in data['regions']))} RAM"),
        ("parent", data["parent"] or "-"),
        ("disks", ", ".join(data["targets"]) or "-"),
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


@app.command()
def save(
    context: typer.Context,
    vm: VmName,
    name: SnapshotName,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="A folder that is not there yet, on a disk.")],
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Save a snapshot on a disk, RAM compressed; the guest runs on. It outlives the QEMU process and the host's
    memory."""
    from hvctl.operations import archive as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.save(engine, vm, name, to, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command()
def load(
    context: typer.Context,
    vm: VmName,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `snapshot save` made.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Call it so. Default: as it was called.")] = None,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Start a VM that is off from a saved snapshot, in a new QEMU process; what its disks held since is gone."""
    from hvctl.operations import archive as verbs

    options = globals_of(context)
    with options.engine() as engine:
        result = verbs.load(engine, vm, folder, name, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    pending(result, exit_code)


@app.command()
def diff(context: typer.Context, vm: VmName, a: SnapshotName, b: SnapshotName) -> None:
    """Show where RAM and disks of two snapshots differ; offsets are bytes of the memory region or of the disk."""
    from hvctl.operations import archive as verbs

    options = globals_of(context)
    found = verbs.difference(options.settings(), vm, a, b)
    render.detail(options, "difference", codec.dump(found), _differences(found))


def _differences(found: Difference) -> list[tuple[str, str]]:
    """One line for what is touched, and its first ranges."""
    parts = [(f"ram {r.region}", r.bytes, r.ranges) for r in found.ram]
    parts += [(f"disk {d.target}", d.bytes, d.ranges) for d in found.disks]
    lines = []
    for what, size, ranges in parts:
        shown = [f"{r.start:#x}-{r.end:#x} ({format_size(r.end - r.start)})" for r in ranges[:SHOWN]]
        more = [f"and {len(ranges) - SHOWN} more: -f json has them all"] if len(ranges) > SHOWN else []
        ranged = f" in {len(ranges)} ranges" if len(ranges) > 1 else ""
        lines.append((what, f"{format_size(size)}{ranged}" if size else "the same"))
        lines += [("", text) for text in (*shown, *more)]
    return lines


def reset(
    context: typer.Context,
    vm: VmName,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="NAME", help="The snapshot to return to.", autocompletion=snapshot_names),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PARTS", help=f"Only these parts: {PARTS}; several with commas."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="disk:NAME", help="Everything but these disks goes back.")
    ] = None,
    tracker: Annotated[TrackerKind, typer.Option(help="How the pages that were written are found.")] = TrackerKind.AUTO,
    audit: Annotated[
        bool | None, typer.Option("--audit/--no-audit", help="Compare all RAM. Default: every audit_every-th reset.")
    ] = None,
    accept_incoherent: Annotated[
        bool, typer.Option("--accept-incoherent", help="Do it although parts would be of different moments.")
    ] = False,
    replug: Annotated[
        bool,
        typer.Option("--replug", help="Unplug the disks of --only from the guest for it, which may be using them."),
    ] = False,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A reset policy; options given here are stronger.")
    ] = None,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Return a running VM, or parts of it, to a snapshot inside the same QEMU process; what it did since is gone."""
    from hvctl.operations import policy as policies
    from hvctl.operations import snapshot as verbs

    options = globals_of(context)
    scope, wishes = policies.merged(policy, only or [], keep or [], tracker, audit, accept_incoherent, replug)
    with options.engine() as engine:
        result = verbs.reset(engine, vm, to, scope, wishes, dry_run=dry_run, key=options.key)
    render.outcome(options, result)
    if dry_run and options.format is Format.TABLE:
        print("\n".join(_foretold(result.result)))
    pending(result, exit_code)


def _foretold(told: dict[str, Any]) -> list[str]:
    """What only a dry run tells: the class, the parts, and what earlier resets of them took."""
    lines = [f"class: {told['coherence']}"] if "coherence" in told else []
    lines.append(f"parts: {', '.join(told['scope'])}")
    if expected := told["expected"]:
        paused = expected["paused"]
        pause = "no pause" if paused is None else f"{format_seconds(paused)} of pause"
        written = "" if expected["bytes"] is None else f", {format_size(expected['bytes'])} of RAM"
        took = format_seconds(expected["took"])
        lines.append(f"expected: {pause}{written}, {took} in all (of {expected['resets']} resets)")
    else:
        lines.append("expected: not known, there was no such reset yet")
    return lines
