"""hvctl vm list|show: what VMs are, as a person reads it."""

from __future__ import annotations

from typing import Any

import typer

from hvctl.cli import render
from hvctl.cli.context import globals_of
from hvctl.cli.options import VmName
from hvctl.cli.render import Column
from hvctl.units import format_rate, format_size


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
