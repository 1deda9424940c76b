"""hvctl profile show"""

from __future__ import annotations

from typing import Any

import typer

from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.options import VmName
from hvctl.units import format_duration, format_rate, format_size, format_time

app = typer.Typer(help="How VMs behave.", no_args_is_help=True)


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} cores"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _size(value: float | None) -> str:
    return format_size(None if value is None else round(value))


def _rate(value: float | None) -> str:
    return format_rate(None if value is None else round(value))


def _bytes_rate(value: float | None) -> str:
    return "-" if value is None else f"{_size(value)}/s"


MEASURES = {
    "cpu_cores": ("CPU", _cores),
    "memory_bytes": ("memory", _size),
    "iops": ("IOPS", _count),
    "disk_bytes_per_second": ("disk", _bytes_rate),
    "network_bits_per_second": ("network", _rate),
}


@app.command()
def show(context: typer.Context, vm: VmName) -> None:
    """Show how a VM behaved in the last week, how it was interrupted, and what it would need after the next time."""
    from hvctl.operations import profile as verbs

    options = globals_of(context)
    with options.engine() as engine:
        data = verbs.show(engine, vm)
    render.detail(options, "profile", data, _lines(data))


def _lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    from hvctl.operations.restarts import in_words

    after = data["after_interruption"]
    uptime = data["uptime_seconds"]
    lines = [
        ("instance id", data["instance_id"]),
        ("name", data["name"]),
        ("state", data["state"] or "not on this host"),
        ("job type", data["job_type"] or "-"),
    ]
    for key, (name, text) in MEASURES.items():
        lines.append((name, f"average {text(data[key]['average'])}, peak {text(data[key]['peak'])}"))
    lines += [
        ("uptime", "-" if uptime is None else format_duration(uptime)),
        ("connections", _count(data["connections"])),
        ("interruptions", str(sum(e["kind"] == "interruption" for e in data["interruptions"]))),
        *(("", f"{format_time(e['at'])} {e['kind']} {e['detail']}".rstrip()) for e in data["interruptions"]),
    ]
    for one in data["returns"]:
        when = f"{format_time(one['returned_at'])}, first {format_duration(one['span'])}"
        lines.append(("returned", f"{when}: {in_words([one])}"))
    if after["reason"] is not None:
        lines.append(("after one", after["reason"]))
    else:
        for key, who in after["answered"].items():
            name, text = MEASURES[key]
            lines.append((f"{name} after one", f"{text(after[key])} at {after['quantile']:g} ({who})"))
    lines.append(("updated", "-" if data["updated_at"] is None else format_time(data["updated_at"])))
    return lines
