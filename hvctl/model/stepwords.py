"""Steps in words: their names in journals and fault points, and their arguments in one line for people."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.awaysteps import Notice
from hvctl.model.plan import LoadState, Step
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import VmSpec
from hvctl.units import format_rate, format_size


def format_range(value: Range) -> str:
    return f"{value.start:#x}-{value.end:#x}"


def step_name(step: Step) -> str:
    """The step's name in journals and fault points: SetVcpus is set_vcpus."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(step).__name__).lstrip("_")


def step_detail(step: Step) -> str:
    """The step's arguments in one line for people: names instead of whole documents, sizes and rates with units."""
    return " ".join(text for f in fields(step) if (text := _shown(f.name, getattr(step, f.name))))


def _shown(name: str, value: Any) -> str:
    match value:
        case NicLimit():
            return f"{value.mac} in {format_rate(value.inbound)} out {format_rate(value.outbound)}"
        case DiskLimit():
            given = ((f.name, getattr(value, f.name)) for f in fields(value) if f.name != "target")
            limits = " ".join(f"{n} {v}" for n, v in given if v is not None)
            return f"{value.target} {limits or 'no limit'}"
        case Snapshot() | VmSpec():
            return value.name
        case Range():
            return format_range(value)
        case LoadState():
            return value.snapshot.name
        case Notice():
            return f"{value.event} ({value.how})"
        case TrackerKind():
            return "" if value is TrackerKind.AUTO else value.value
        case None if name not in ("percent", "weight"):
            return ""
        case tuple() if name == "ranges":
            return " ".join(map(format_range, value))
        case tuple():
            return " ".join(map(str, value))
        case Record():
            return f"{value.allocation.vcpus} vCPUs {format_size(value.allocation.memory)}"
        case bool():
            return name.replace("_", " ") if value else ""
    match name:
        case "uuid":
            return ""
        case "xml":
            return f"{len(value)} characters"
        case "target" if isinstance(value, int):
            return format_size(value)
        case "tries":
            return f"pass {value}"
        case "seconds":
            return f"at most {value:g} s"
        case "percent":
            return "no quota" if value is None else f"{value}%"
        case "weight":
            return "default" if value is None else str(value)
    return str(value)
