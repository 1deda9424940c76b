"""Sizes, rates and percentages with a unit, exact: no float between what was typed and the number used.

Own code because the libraries at hand (pydantic's ByteSize, humanfriendly) take a bare number and round through float,
and a wrong memory target is a dead guest.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

from hvctl.errors import UsageError

_SIZE = {"B": 1}
for _i, _p in enumerate("KMGTP", start=1):
    _SIZE[f"{_p}iB"] = 1024**_i
    _SIZE[f"{'k' if _p == 'K' else _p}B"] = 1000**_i
_RATE = {"bit": 1}
for _i, _p in enumerate("KMGT", start=1):
    _RATE[f"{_p}ibit"] = 1024**_i
    _RATE[f"{'k' if _p == 'K' else _p}bit"] = 1000**_i
_TIME = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)\s*")


def _parse(text: str, table: dict[str, int], what: str, example: str) -> int:
    match = _NUMBER.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is not a {what}.", f"write a number with a unit, such as {example}")
    number, unit = match.groups()
    if not unit:
        raise UsageError(f"the {what} {text!r} has no unit.", f"write one, such as {example}")
    known = {u.lower(): f for u, f in table.items()}
    factor = table.get(unit) or known.get(unit.lower())
    if factor is None:
        raise UsageError(f"{unit!r} is not a unit of a {what}.", f"known units: {', '.join(table)}")
    value = Decimal(number) * factor
    if value != value.to_integral_value():
        raise UsageError(f"the {what} {text!r} is not a whole number of units.", f"write it exactly, such as {example}")
    if value >= 2**62:
        raise UsageError(f"the {what} {text!r} is too large.", f"write one such as {example}")
    return int(value)


def parse_size(text: str) -> int:
    """Bytes from `256MiB`, `1GiB`, `1.5GB`; UsageError for a bare number."""
    return _parse(text, _SIZE, "size", "256MiB")


def parse_rate(text: str) -> int:
    """Bits per second from `20Mbit`, `1Gbit`; UsageError for a bare number."""
    return _parse(text.removesuffix("/s"), _RATE, "rate", "20Mbit")


def parse_byte_rate(text: str) -> int:
    """Bytes per second from `50MiB` or `50MiB/s`."""
    return _parse(text.removesuffix("/s"), _SIZE, "disk rate", "50MiB")


def parse_percent(text: str) -> int:
    """Whole percent of one CPU from `150%`."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*%\s*", text)
    if not match:
        raise UsageError(f"{text!r} is not a percentage of one CPU.", "write a whole number with a sign, such as 150%")
    return int(match[1])


def format_size(value: int | None) -> str:
    """`256 MiB`; the largest binary unit that keeps it readable. None is "-"."""
    if value is None:
        return "-"
    for power, prefix in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.1f}".removesuffix(".0") + f" {prefix}iB"
    return f"{value} B"


def format_rate(value: int | None) -> str:
    """`20 Mbit/s`; None is "-", which stands for unlimited."""
    if value is None:
        return "-"
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if abs(value) >= 1000**power:
            return f"{value / 1000**power:.1f}".removesuffix(".0") + f" {prefix}bit/s"
    return f"{value} bit/s"


def parse_duration(text: str) -> float:
    """Seconds from `90s`, `30min`, `4h`, `2d`."""
    return float(_parse(text, _TIME, "duration", "30min"))


def parse_moment(text: str, now: float) -> float:
    """Seconds since 1970 from RFC 3339 with a zone, or from a duration after `now` such as `+2h`."""
    if text.startswith("+"):
        return now + parse_duration(text[1:])
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise UsageError(f"{text!r} is not a time.", "write +2h, or 2026-01-31T18:00:00Z")
    return found.timestamp()


def moment(text: str) -> float:
    """Seconds since 1970 of a time that hvctl itself wrote, in RFC 3339."""
    return datetime.fromisoformat(text).timestamp()


def format_time(at: float) -> str:
    """RFC 3339 in UTC, of seconds since 1970."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def format_duration(seconds: float) -> str:
    """`1h30min`; whole seconds below a minute."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes = divmod(whole // 60, 60)
    return "".join([f"{hours}h" if hours else "", f"{minutes}min" if minutes or not hours else ""])


def format_seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
