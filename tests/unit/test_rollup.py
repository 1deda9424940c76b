"""Five-minute rows from raw ones against numpy, and which rows are old."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.rollup import SLOT, cutoffs, last_full_slot, percentile, roll_up, slot, statistics
from hvctl.model.sample import ROLLED_COLUMNS, STORED

values = st.floats(0, 1e9)


def raw(at: int, vm: int, **given: float | None) -> tuple[float | None, ...]:
    row: dict[str, float | None] = {**dict.fromkeys(STORED), "seconds": 10.0, **given}
    return (at, vm, *(row[name] for name in STORED))


def named(row: tuple[float | None, ...]) -> dict[str, float | None]:
    return dict(zip(("at", "vm", *ROLLED_COLUMNS), row, strict=True))


@given(st.lists(values, min_size=1, max_size=60), st.floats(0, 1))
def test_a_percentile_is_numpys(found: list[float], share: float) -> None:
    assert percentile(found, share) == pytest.approx(np.percentile(found, share * 100), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(values, st.floats(1, 30)), min_size=1, max_size=60))
def test_statistics_are_numpys(found: list[tuple[float, float]]) -> None:
    numbers, weights = [v for v, _ in found], [w for _, w in found]
    mean, largest, p95 = statistics(numbers, weights)
    close = {"rel": 5e-3, "abs": 1e-3}
    assert mean == pytest.approx(np.average(numbers, weights=weights), **close)
    assert largest == max(numbers)
    assert p95 == pytest.approx(np.percentile(numbers, 95), **close)
    assert mean is not None
    assert mean <= largest


def test_a_mean_counts_seconds_and_not_rows() -> None:
    assert statistics([1.0, 4.0], [30.0, 10.0])[0] == 1.75


def test_what_is_not_known_does_not_count() -> None:
    assert statistics([None, 2.0, None, 4.0], [10.0] * 4)[:2] == (3, 4)
    assert statistics([None, None], [10.0, 10.0]) == (None, None, None)


def test_rows_by_slot_and_vm() -> None:
    rows = [
        raw(310, 2, cpu=1.0, vcpus=2, memory=100.0),
        raw(320, 2, cpu=3.0, vcpus=4, memory=50.0),
        raw(600, 2, cpu=5.0, vcpus=1, memory=10.0),
        raw(601, 2, cpu=7.0),
        raw(320, 1, cpu=0.0),
    ]
    found = [named(row) for row in roll_up(reversed(rows))]
    assert [(r["at"], r["vm"], r["count"], r["seconds"]) for r in found] == [
        (300, 1, 1, 10), (300, 2, 3, 30), (600, 2, 1, 10),
    ]  # fmt: skip
    idle, busy, _ = found
    assert (idle["cpu_mean"], idle["cpu_max"], idle["cpu_p95"], idle["disk_reads_mean"]) == (0, 0, 0, None)
    assert (busy["cpu_mean"], busy["cpu_max"], busy["cpu_p95"]) == (3.0, 5.0, 4.8)
    assert (busy["vcpus"], busy["memory"]) == (1, 10), "what it had at last"


def test_a_sample_belongs_to_the_slot_that_it_ended_in() -> None:
    assert [slot(at) for at in (300, 301, 600, 601)] == [0, 300, 300, 600]
    assert [last_full_slot(now) for now in (599.9, 600, 601, 899.9)] == [0, 300, 300, 300]


@given(st.floats(1e8, 1e10), st.floats(1, 100), st.floats(1, 200))
def test_what_is_kept_is_at_least_what_was_asked_and_whole_slots(now: float, hours: float, days: float) -> None:
    raw_until, rolled_until = cutoffs(now, hours, days)
    assert raw_until % SLOT == rolled_until % SLOT == 0
    assert 0 <= now - hours * 3600 - raw_until < SLOT + 1
    assert 0 <= now - days * 86400 - rolled_until < SLOT + 1
