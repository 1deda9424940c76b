"""hvctl allocate"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.options import DryRun, ExitCode, VmName, pending
from hvctl.errors import UsageError
from hvctl.model.allocation import KEEP, Change, DiskChange, Keep, NicChange
from hvctl.units import format_rate, format_size, parse_byte_rate, parse_percent, parse_rate, parse_size

T = TypeVar("T")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{text!r} is not a whole number.", "write digits, or `none` for no limit")
    return int(text)


def _limit(text: str | None, parse: Callable[[str], int]) -> int | Keep | None:
    """An option that was not given keeps what is; `none` takes the limit away."""
    if text is None:
        return KEEP
    return None if text.strip().lower() == "none" else parse(text)


def allocate(
    context: typer.Context,
    vm: VmName,
    vcpus: Annotated[int | None, typer.Option(metavar="N", help="vCPUs online in the guest.")] = None,
    cpu_quota: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="CPU time of the whole VM, 150% is 1.5 CPUs; or none.")
    ] = None,
    cpu_weight: Annotated[
        str | None, typer.Option(metavar="N", help="Share when CPUs are short, 1 to 10000, default 100; or none.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory, such as 512MiB.")] = None,
    net_in: Annotated[
        str | None, typer.Option(metavar="RATE", help="Bandwidth to the guest, such as 20Mbit; or none.")
    ] = None,
    net_out: Annotated[
        str | None, typer.Option(metavar="RATE", help="Bandwidth from the guest, such as 20Mbit; or none.")
    ] = None,
    nic: Annotated[str | None, typer.Option(metavar="DEV", help="A tap or MAC; default: every NIC.")] = None,
    iops: Annotated[str | None, typer.Option(metavar="N", help="Disk operations per second; or none.")] = None,
    disk_rate: Annotated[
        str | None, typer.Option(metavar="RATE", help="Disk bytes per second, such as 50MiB; or none.")
    ] = None,
    iops_burst: Annotated[str | None, typer.Option(metavar="N", help="Operations per second in a burst.")] = None,
    disk_burst: Annotated[str | None, typer.Option(metavar="RATE", help="Disk bytes per second in a burst.")] = None,
    burst_seconds: Annotated[str | None, typer.Option(metavar="N", help="How long a burst may last.")] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="TARGET", help="A disk (vda, or its name); default: every writable disk.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Shrink memory without the guest's statistics.")] = False,
    best_effort: Annotated[bool, typer.Option("--best-effort", help="Keep a partial memory result.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show before and after of what changes.")] = False,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
) -> None:
    """Change what a running or stopped VM may use: one plan, applied whole or undone.

    \b
    Examples:
      hvctl allocate ci-1 --vcpus 2 --memory 512MiB
      hvctl allocate ci-1 --net-in 20Mbit --net-out none --iops 500
    """
    nics = NicChange(nic, _limit(net_in, parse_rate), _limit(net_out, parse_rate))
    disks = DiskChange(
        disk,
        _limit(iops, _count),
        _limit(disk_rate, parse_byte_rate),
        _limit(iops_burst, _count),
        _limit(disk_burst, parse_byte_rate),
        _limit(burst_seconds, _count),
    )
    change = Change(
        KEEP if vcpus is None else vcpus,
        KEEP if memory is None else parse_size(memory),
        _limit(cpu_quota, parse_percent),
        _limit(cpu_weight, _count),
        () if nics == NicChange(nic) else (nics,),
        () if disks == DiskChange(disk) else (disks,),
    )
    if change == Change():
        raise UsageError("allocate was not told what to change.", "hvctl allocate --help lists the resources")
    if exit_code and not dry_run:
        raise UsageError("--exit-code belongs to --dry-run.", "add --dry-run")
    from hvctl.operations.allocate import allocate as run

    options = globals_of(context)
    with options.engine() as engine:
        result = run(engine, vm, change, force=force, best_effort=best_effort, dry_run=dry_run, key=options.key)
    render.outcome(options, result, _difference(result.result) if diff else ())
    pending(result, exit_code)


def _difference(result: dict[str, object]) -> list[tuple[str, str, str]]:
    """(what, before, after) of every field that differs between the two allocations of a result."""
    before, after = _fields(result.get("before")), _fields(result.get("after"))
    return [(k, before.get(k, "-"), after[k]) for k in after if before.get(k, "-") != after[k]]


def _fields(allocation: object) -> dict[str, str]:
    if not isinstance(allocation, dict):
        return {}
    shown = {
        "vcpus": str(allocation["vcpus"]),
        "memory": format_size(allocation["memory"]),
        "cpu_quota": "-" if allocation["cpu_quota"] is None else f"{allocation['cpu_quota']}%",
        "cpu_weight": "-" if allocation["cpu_weight"] is None else str(allocation["cpu_weight"]),
    }
    for nic in allocation["nics"]:
        shown[f"net_in {nic['mac']}"] = format_rate(nic["inbound"])
        shown[f"net_out {nic['mac']}"] = format_rate(nic["outbound"])
    for disk in allocation["disks"]:
        for name in ("iops", "iops_burst", "burst_seconds"):
            shown[f"{name} {disk['target']}"] = "-" if disk[name] is None else str(disk[name])
        for name in ("rate", "rate_burst"):
            shown[f"{name} {disk['target']}"] = "-" if disk[name] is None else f"{format_size(disk[name])}/s"
    return shown
