"""hvctl pool show|set, hvctl reserve list|create|release"""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from hvctl import codec
from hvctl.cli import render
from hvctl.cli.context import Format, globals_of
from hvctl.cli.options import DryRun
from hvctl.cli.render import Column
from hvctl.decide.reservations import Wanted
from hvctl.errors import UsageError
from hvctl.model.allocation import Resources
from hvctl.model.pool import Limits
from hvctl.units import (
    format_duration,
    format_rate,
    format_size,
    format_time,
    parse_duration,
    parse_moment,
    parse_rate,
    parse_size,
)

app = typer.Typer(help="What this host has, promised, uses, expects, and keeps for somebody.", no_args_is_help=True)
reserve = typer.Typer(help="Reservations: room of this host that is kept for an owner.", no_args_is_help=True)

_WORDS: dict[str, Callable[[int], str]] = {
    "cpu": lambda v: f"{v / 100:g} CPUs",
    "memory": format_size,
    "network": format_rate,
    "iops": lambda v: f"{v} IOPS",
}
NONE = "none"
_AMOUNTS = ("total", "reserve", "capacity", "allocated", "used", "forecast", "reserved", "free")
POOL = (
    Column("resource", "RESOURCE"),
    Column("overcommit", "OVERCOMMIT", lambda v: "-" if v is None else f"{v:g}"),
    *(Column(f"{n}_text", n.upper()) for n in _AMOUNTS),
)


def cpus(text: str) -> int:
    """Percent of one CPU from `2`, `1.5`."""
    try:
        percent = Decimal(text) * 100
    except InvalidOperation:
        percent = Decimal(-1)
    if percent < 0 or percent >= 2**40 or percent != percent.to_integral_value():
        raise UsageError(f"{text!r} is not a number of CPUs.", "write 2, or 1.5")
    return int(percent)


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise UsageError(f"{text!r} is not a whole number.", "write digits, such as 500")
    return int(text)


def need(text: str) -> Resources:
    """`cpu=2,memory=4GiB,network=100Mbit,iops=500`."""
    parsers = {"cpu": cpus, "memory": parse_size, "network": parse_rate, "iops": count}
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in parsers or name in found:
            raise UsageError(f"{part!r} is no part of a need.", "write cpu=2,memory=4GiB,network=100Mbit,iops=500")
        found[name] = parsers[name](value)
    return Resources(**found)


def in_words(amount: dict[str, int]) -> str:
    return ", ".join(_WORDS[n](v) for n, v in amount.items() if v) or "nothing"


@app.command()
def show(context: typer.Context) -> None:
    """Show the pool: per resource what there is, what of it may be promised, is promised, used, expected and kept.

    `free` is what a VM without a reservation would get, for ever; `used` is what is observed now.
    """
    from hvctl.operations import pool as verbs

    options = globals_of(context)
    with options.engine() as engine:
        data = verbs.show(engine)
    if options.format is Format.TABLE:
        for row in data:
            words = _WORDS[row["resource"]]
            row.update({f"{n}_text": "-" if row[n] is None else words(row[n]) for n in _AMOUNTS})
    render.rows(options, "pool", data, POOL if options.format is Format.TABLE else _PLAIN)


_PLAIN = tuple(Column(n, n) for n in ("resource", "overcommit", *_AMOUNTS))


@app.command("set")
def set_(
    context: typer.Context,
    cpu_overcommit: Annotated[float | None, typer.Option(metavar="RATIO", help="CPUs promised per CPU.")] = None,
    memory_overcommit: Annotated[float | None, typer.Option(metavar="RATIO", help="Memory promised per byte.")] = None,
    reserve_cpus: Annotated[int | None, typer.Option(metavar="N", min=0, help="CPUs the host keeps.")] = None,
    reserve_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory the host keeps; or none.")] = None,
    network: Annotated[
        str | None, typer.Option(metavar="RATE", help="Bandwidth that may be promised; or none.")
    ] = None,
    iops: Annotated[str | None, typer.Option(metavar="N", help="IOPS that may be promised; or none.")] = None,
) -> None:
    """Set what of this host may be promised. It is kept in the database, and goes before the settings' own values,
    which `none` goes back to."""
    from hvctl.operations import pool as verbs

    limits = Limits(
        cpu_overcommit,
        memory_overcommit,
        reserve_cpus,
        _given(reserve_memory, parse_size),
        _given(network, parse_rate),
        _given(iops, count),
    )
    texts = {"reserve_memory": reserve_memory, "network_capacity": network, "iops_capacity": iops}
    unset = frozenset(name for name, text in texts.items() if text == NONE)
    if limits == Limits() and not unset:
        raise UsageError("pool set was not told what to set.", "hvctl pool set --help lists what there is")
    options = globals_of(context)
    with options.engine() as engine:
        made = codec.dump(verbs.set_limits(engine, limits, unset))
    render.detail(options, "pool", made, [(k, "-" if v is None else str(v)) for k, v in made.items()])


def _given(text: str | None, parse: Callable[[str], int]) -> int | None:
    return None if text in (None, NONE) else parse(text)


# --- reservations


def _owner_column(value: Any) -> str:
    return str(value)


RESERVATIONS = (
    Column("id", "ID"),
    Column("owner", "OWNER", _owner_column),
    Column("state", "STATE"),
    Column("size", "ASKED", in_words),
    Column("kept", "KEPT", in_words),
    Column("starts_at", "FROM", lambda v: format_time(v)),
    Column("ends_at", "TO", lambda v: "-" if v is None else format_time(v)),
    Column("half_life", "HALF-LIFE", lambda v: "-" if v is None else format_duration(v)),
    Column("hit", "USED", lambda v: ", ".join(f"{n} {share:.0%}" for n, share in v.items()) or "-"),
    Column("reason", "REASON"),
)


@reserve.command("list")
def list_(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
) -> None:
    """List reservations, with what each keeps now and how much of what it kept was used."""
    from hvctl.operations import pool as verbs

    options = globals_of(context)
    with options.engine() as engine:
        data = verbs.reservations(engine, ended=every)
    render.rows(options, "reservations", data, RESERVATIONS)


@reserve.command("create")
def create(
    context: typer.Context,
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="A VM by name or UUID, there or to come, or any text.")],
    cpu: Annotated[str | None, typer.Option(metavar="N", help="CPUs, such as 1.5.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory, such as 4GiB.")] = None,
    net: Annotated[str | None, typer.Option(metavar="RATE", help="Bandwidth, such as 100Mbit.")] = None,
    iops: Annotated[str | None, typer.Option(metavar="N", help="IOPS.")] = None,
    start: Annotated[str, typer.Option("--from", metavar="TIME", help="When it begins: +1h, or a time.")] = "+0s",
    lasts: Annotated[str | None, typer.Option("--for", metavar="DURATION", help="How long; default: for ever.")] = None,
    half_life: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Half of what is not used goes back in this time.")
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Keep room for an owner: all of it, or a refusal that says what lacks."""
    from hvctl.operations import pool as verbs

    begins = parse_moment(start, time.time())
    life = None if half_life is None else parse_duration(half_life)
    if life == 0:
        raise UsageError("a half-life of nothing.", "leave it out, or write 10min")
    options = globals_of(context)
    with options.engine() as engine:
        size = Resources(
            0 if cpu is None else cpus(cpu),
            0 if memory is None else parse_size(memory),
            0 if net is None else parse_rate(net),
            0 if iops is None else count(iops),
        )
        ends = None if lasts is None else begins + parse_duration(lasts)
        wanted = Wanted(owner, reason, size, begins, ends, life)
        made = verbs.described(verbs.reserve(engine, wanted, key=options.key, dry_run=dry_run), engine.clock())
        made["id"] = None if dry_run else made["id"]
    _shown(options, made)


@reserve.command("release")
def release(context: typer.Context, number: Annotated[int, typer.Argument(metavar="ID", min=1, max=2**63 - 1)]) -> None:
    """End a reservation now."""
    from hvctl.operations import pool as verbs

    options = globals_of(context)
    with options.engine() as engine:
        made = verbs.described(verbs.release(engine, number), engine.clock())
    _shown(options, made)


def _shown(options: Any, made: dict[str, Any]) -> None:
    render.detail(options, "reservation", made, [(c.heading.lower(), c.text(made[c.key])) for c in RESERVATIONS])
