"""hvctl top: a live table on a terminal, plain lines in a pipe, one document in other formats."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hvctl.cli import render
from hvctl.cli.context import Format, Globals, globals_of
from hvctl.cli.options import bounded
from hvctl.cli.printable import one_line
from hvctl.cli.render import Column
from hvctl.units import format_rate, format_size

if TYPE_CHECKING:
    from hvctl.operations.top import Top

_BARS = "▁▂▃▄▅▆▇█"


class SortBy(StrEnum):
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    NETWORK = "network"


def top(
    context: typer.Context,
    sort: Annotated[
        SortBy, typer.Option("--sort", help="The resource of which the busiest VM comes first.")
    ] = SortBy.CPU,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", callback=bounded, help="Seconds between two looks.")
    ] = 2.0,
    count: Annotated[
        int | None,
        typer.Option("-n", "--count", metavar="N", min=1, help="Looks; without it one in a pipe, else until Ctrl-C."),
    ] = None,
) -> None:
    """Show what VMs use, may use, are expected to use and were promised, the busiest first."""
    from hvctl.operations.top import Resource, Top

    options = globals_of(context)
    with options.engine() as engine, suppress(KeyboardInterrupt):
        watched = Top(engine, Resource(sort.value))
        if options.format is not Format.TABLE:
            lines = [line.document() for line in _last(watched, interval, count or 1)]
            render.rows(options, "vms", lines, [Column(key, key) for key in FLAT])
            _say(options, watched)
        elif sys.stdout.isatty():
            _live(watched, interval, count, sort.value)
        else:
            for look in range(count or 1):
                if look:
                    time.sleep(interval)
                rows = [_row(line.document()) for line in watched.look(interval)]
                render.rows(options, "vms", rows, COLUMNS)
                sys.stdout.flush()
                _say(options, watched)


def _say(options: Globals, watched: Top) -> None:
    if watched.gap:
        options.say(f"no rates this time: {watched.gap}")


def _last(watched: Top, interval: float, count: int) -> Sequence[Any]:
    for _ in range(count - 1):
        watched.look(interval)
        time.sleep(interval)
    return watched.look(interval)


def _live(watched: Top, interval: float, count: int | None, sort: str) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(width: int) -> Table:
        rows = [_row(line.document()) for line in watched.look(interval)]
        columns = fitting(rows, width, sort)
        gap = f"no rates this time: {watched.gap}" if watched.gap else None
        made = Table(box=None, header_style="bold", pad_edge=False, caption=gap, caption_justify="left")
        for column in columns:
            made.add_column(column.heading, no_wrap=True)
        for row in rows:
            made.add_row(*(Text(one_line(c.text(row[c.key]))) for c in columns))
        return made

    with Live(auto_refresh=False, screen=count is None) as live:
        looks = 0
        while count is None or looks < count:
            if looks:
                time.sleep(interval)
            live.update(table(live.console.width), refresh=True)
            looks += 1


def fitting(rows: Sequence[Mapping[str, Any]], width: int, sort: str) -> list[Column]:
    """The columns that a terminal of `width` characters has room for, what is sorted by among them: a few that can be
    read, and not all cut short."""
    shown = list(COLUMNS)
    for key in EXPENDABLE:
        if sum(_width(c, rows) + GAP for c in shown) - GAP <= width:
            break
        shown = [c for c in shown if c.key != key or key == sort]
    return shown


def _width(column: Column, rows: Sequence[Mapping[str, Any]]) -> int:
    return max([len(column.heading), *(len(one_line(column.text(row[column.key]))) for row in rows)])


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """One VM as a person reads it: used of allocated."""
    used, allocated = line["used"], line["allocated"]
    return {
        "name": line["name"],
        "cpu": f"{_cores(used['cpu'])} of {_cores(allocated['cpu'])}",
        "memory": f"{_size(used['memory'])} of {_size(allocated['memory'])}",
        "disk": f"{_size(used['disk'])}/s" if used["disk"] is not None else "-",
        "iops": "-" if used["iops"] is None else f"{used['iops']:.0f}",
        "network": _rate(used["network"]),
        "forecast": _pair(line["forecast"]),
        "promised": _pair(line["promised"]),
        "trend": sparkline(line["trend"]),
    }


def _pair(use: Mapping[str, Any]) -> str:
    if use["cpu"] is None and use["memory"] is None:
        return "-"
    return f"{_cores(use['cpu'])}, {_size(use['memory'])}"


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _size(value: float | None) -> str:
    return format_size(None if value is None else round(value))


def _rate(value: float | None) -> str:
    return format_rate(None if value is None else round(value))


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value, from nothing to the largest of them; a gap is a space."""
    largest = max((v for v in values if v is not None), default=0.0)
    steps = len(_BARS) - 1
    return "".join(" " if v is None else _BARS[round(v / largest * steps) if largest else 0] for v in values)


FLAT = ("name", "uuid", "at", "used", "allocated", "forecast", "promised", "per_vcpu", "trend")
COLUMNS = (
    Column("name", "VM"),
    Column("cpu", "CPU"),
    Column("memory", "MEMORY"),
    Column("disk", "DISK"),
    Column("iops", "IOPS"),
    Column("network", "NETWORK"),
    Column("forecast", "FORECAST"),
    Column("promised", "PROMISED"),
    Column("trend", "TREND"),
)
EXPENDABLE = ("trend", "iops", "promised", "forecast", "network", "disk")
GAP = 2
