"""hvctl vm create|list|show|start|stop|delete|exec|console|adopt|protect|set"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import DryRun, ExitCode, ExitCodeUnlessYes, VmName, bounded, pending
from hvctl.cli.printable import printable
from hvctl.cli.render import Column
from hvctl.errors import RefusedError, UsageError
from hvctl.units import format_rate, format_size, parse_size

# libvirt carries requests of 4 MiB, and base64 takes a third more than the bytes.
STDIN_LIMIT = 2 << 20

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


@app.command("list")
def list_(context: typer.Context) -> None:
    """List every VM of the host, whoever defined it."""
    from hvctl.operations import inspect

    options = globals_of(context)
    data = inspect.vms(options.settings())
    render.rows(
        options,
        "vms",
        data,
        (
            Column("name", "NAME"),
            Column("state", "STATE"),
            Column("accel", "ACCEL"),
            Column("vcpus", "VCPUS"),
            Column("memory", "MEMORY", format_size),
            Column("cpu_quota", "QUOTA", lambda v: "-" if v is None else f"{v}%"),
            Column("image", "IMAGE"),
            Column("managed", "MANAGED", lambda v: "yes" if v else "no"),
            Column("warm", "WARM", lambda v: "ready" if v else "no"),
            Column("labels", "LABELS", lambda v: ",".join(f"{k}={w}" for k, w in v.items()) or "-"),
        ),
    )


@app.command()
def show(context: typer.Context, vm: VmName) -> None:
    """Show one VM: what it may use, as libvirt and the kernel enforce it, and what was promised to it."""
    from hvctl.operations import inspect

    options = globals_of(context)
    data = inspect.vm(options.settings(), vm)
    render.detail(options, "vm", data, _lines(data))


def _lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    allocation = data["allocation"]
    process = data["process"]
    lines = [
        ("name", data["name"]),
        ("uuid", data["uuid"]),
        ("state", data["state"] if data["reason"] == "unknown" else f"{data['state']} ({data['reason']})"),
        ("agent", _agent(data)),
        ("accelerator", f"{data['accel']}: {data['accel_reason']}"),
        ("process", f"pid {process['pid']}" if process else "-"),
        ("vcpus", f"{allocation['vcpus']} of {data['max_vcpus']}"),
        ("memory", f"{format_size(allocation['memory'])} of {format_size(data['max_memory'])}"),
        ("cpu quota", "-" if allocation["cpu_quota"] is None else f"{allocation['cpu_quota']}%"),
        ("cpu weight", "-" if allocation["cpu_weight"] is None else str(allocation["cpu_weight"])),
    ]
    for nic, limit in zip(data["nics"], allocation["nics"], strict=True):
        foreign = f", foreign: {nic['foreign']}" if nic["foreign"] else ""
        rates = f"in {format_rate(limit['inbound'])}, out {format_rate(limit['outbound'])}{foreign}"
        lines.append((f"nic {nic['tap'] or nic['mac']}", f"{nic['mac']} on {nic['bridge'] or '-'}: {rates}"))
    limits = {d["target"]: d for d in allocation["disks"]}
    for disk in data["disks"]:
        limit = limits.get(disk["target"], {})
        parts = [f"{k} {v}" for k, v in limit.items() if k != "target" and v is not None]
        lines.append((f"disk {disk['target']}", f"{disk['name'] or '-'} {disk['path']} {', '.join(parts)}".rstrip()))
    promised = data["promised"]
    lines += [
        ("promised", "-" if promised is None else _promised(promised)),
        ("protected", "yes" if data["protected"] else "no"),
        ("priority", "-" if data["priority"] is None else str(data["priority"])),
        ("interruptible", "yes" if data["interruptible"] else "no"),
        ("labels", ", ".join(f"{k}={v}" for k, v in data["labels"].items()) or "-"),
        ("warm resets", "ready" if not data["missing"] else f"lacks {', '.join(data['missing'])}"),
        ("console", data["console"] or "-"),
    ]
    return lines


def _agent(data: dict[str, Any]) -> str:
    if not data["has_agent"]:
        return "no channel for one"
    return "connected" if data["agent_connected"] else "not connected"


def _promised(allocation: dict[str, Any]) -> str:
    return f"{allocation['vcpus']} vCPUs, {format_size(allocation['memory'])}"


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


@app.command("exec")
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
    if stream.isatty():
        stream.write(printable(data.decode(errors="backslashreplace")))
    else:
        stream.buffer.write(data)
    stream.flush()


@app.command()
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
