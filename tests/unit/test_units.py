"""Sizes and rates: exact, and never without a unit."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.errors import UsageError
from hvctl.units import (
    format_rate,
    format_seconds,
    format_size,
    parse_byte_rate,
    parse_percent,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("1GB", 10**9), ("4096 B", 4096), ("1kB", 1000), ("1KiB", 1024)],
)
def test_size(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text", ["256", "", "MiB", "-1MiB", "1e3MiB", "0.1KiB", "1 XiB", "٣MiB", "9999999999PiB", "nan"]
)
def test_wrong_sizes_are_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    assert error.value.hint


@pytest.mark.parametrize(("text", "value"), [("20Mbit", 20_000_000), ("1Gbit/s", 10**9), ("8Kibit", 8192)])
def test_rate(text: str, value: int) -> None:
    assert parse_rate(text) == value


@pytest.mark.parametrize("text", ["20", "20MiB", "20Mb"])
def test_a_rate_is_in_bits(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)


def test_byte_rate_and_percent() -> None:
    assert parse_byte_rate("50MiB/s") == 50 << 20
    assert parse_percent("150%") == 150
    for wrong in ("150", "1.5%", "-5%"):
        with pytest.raises(UsageError):
            parse_percent(wrong)


@given(st.integers(1, 2**61), st.sampled_from(["B", "KiB", "MiB"]))
def test_no_rounding(number: int, unit: str) -> None:
    factor = {"B": 1, "KiB": 1024, "MiB": 1024**2}[unit]
    if number * factor < 2**62:
        assert parse_size(f"{number}{unit}") == number * factor


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 0


def test_formats() -> None:
    assert format_size(256 << 20) == "256 MiB"
    assert format_size(1536 << 20) == "1.5 GiB"
    assert format_size(None) == "-"
    assert format_rate(20_000_000) == "20 Mbit/s"
    assert format_seconds(0.0421) == "42.1 ms"
    assert format_seconds(2) == "2.00 s"
