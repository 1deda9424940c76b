"""What VMs needed after their starts: found once a span is over, of the right VM, and never of a span that was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hvctl.decide.afterstart import forecast_errors, restarts
from hvctl.model.allocation import Allocation, Record
from hvctl.model.pool import Away, Rung
from hvctl.model.restart import ForecastError, Restart
from hvctl.model.sample import EventKind, Sample, VmEvent

MIB = 1 << 20
START, STOP = EventKind.START, EventKind.STOP


def samples(uuid: str, first: int, cpus: Sequence[float], step: int = 10) -> list[Sample]:
    """The first one ends at `first`."""
    return [
        Sample(uuid, uuid, first + n * step, step, cpu=cpu, memory_used=100 * MIB * (n + 1), disk_read_bytes=2000.0,
               disk_write_bytes=1000.0, net_rx_bytes=125_000.0)
        for n, cpu in enumerate(cpus)
    ]  # fmt: skip


def event(kind: EventKind, at: float, uuid: str = "a") -> VmEvent:
    return VmEvent(uuid, uuid, kind, at)


def found(events: list[VmEvent], of: list[Sample], now: float, spans: Sequence[int] = (60,)) -> list[Restart]:
    ordered = sorted(of, key=lambda s: s.at)
    return restarts(sorted(events, key=lambda e: e.at), ordered, {"a": "micro"}, now, spans)


def test_peak_and_mean_after_a_start_beside_the_hour_before() -> None:
    before = samples("a", 910, [0.5, 0.75, 0.25])
    after = samples("a", 1010, [4.0, 2.0, 1.0, 1.0, 1.0, 3.0, 9.0])
    (one,) = found([event(STOP, 940), event(START, 1000)], before + after, 1060)
    assert (one.vm_uuid, one.image, one.at, one.gap, one.span) == ("a", "micro", 1000, 60, 60)
    assert one.peak["cpu"] == 4.0, "the last sample ends after the span"
    assert one.mean["cpu"] == pytest.approx(2.0)
    assert one.before["cpu"] == 0.75
    assert (one.peak["memory"], one.peak["disk"]) == (600.0, pytest.approx(3.0))
    assert "network" not in one.peak, "half of it was not measured"


def test_a_span_that_is_not_over_waits() -> None:
    after = samples("a", 1010, [1.0] * 5)
    assert found([event(START, 1000)], after, 1059) == []
    assert [r.span for r in found([event(START, 1000)], after, 1060, (30, 60, 90))] == [30, 60]


def test_a_span_in_which_the_vm_stopped_says_nothing() -> None:
    events = [event(START, 1000), event(STOP, 1040), event(START, 1100)]
    said = found(events, samples("a", 1010, [1.0] * 16), 1200)
    assert [(r.at, r.gap) for r in said] == [(1100, 60)]


def test_a_span_of_which_less_than_half_was_seen_says_nothing() -> None:
    assert found([event(START, 1000)], samples("a", 1040, [1.0, 1.0]), 1100) == []
    assert len(found([event(START, 1000)], samples("a", 1040, [1.0] * 3), 1100)) == 1


def test_the_first_start_has_no_gap_and_each_vm_its_own_samples() -> None:
    both = samples("a", 1010, [1.0] * 6) + samples("b", 1010, [7.0] * 6)
    said = found([event(START, 1000), event(START, 1000, "b")], both, 1100)
    assert [(r.vm_uuid, r.image, r.gap, r.peak["cpu"], r.before) for r in said] == [
        ("a", "micro", None, 1.0, {}),
        ("b", None, None, 7.0, {}),
    ]


def test_what_a_return_needed_beside_what_was_predicted() -> None:
    has = Allocation(1, 256 * MIB)
    predicted = {"cpu": 2.0, "memory": 0.0, "network": 5.0}
    away = Away("a", "a", Rung.SAVE, Record(has), has, Record(has), 500.0, 900.0, "", "", returned_at=1000.0,
                predicted=predicted)  # fmt: skip
    earlier, later = ([Restart("a", None, at, 60.0, 300, {"cpu": 9.0})] for at in (400.0, 1100.0))
    mine = [
        Restart("a", None, 990.0, 400.0, span, {"cpu": cpu, "memory": 90.0, "disk": 1.0})
        for span, cpu in ((1800, 3.0), (300, 1.0))
    ]
    other = [Restart("b", None, 990.0, 400.0, 300, {"cpu": 7.0})]
    again = [Restart("a", None, 998.0, 1.0, 300, {"cpu": 8.0})]
    found = forecast_errors(away, [*earlier, *again, *mine, *later, *other])
    assert found == [
        ForecastError("cpu", 300, 2.0, 1.0),
        ForecastError("memory", 300, 0.0, 90.0),
        ForecastError("cpu", 1800, 2.0, 3.0),
        ForecastError("memory", 1800, 0.0, 90.0),
    ]
    assert [e.ratio for e in found] == [0.5, None, 1.5, None]
    assert forecast_errors(replace(away, returned_at=None), mine) == []
    assert forecast_errors(replace(away, rung=Rung.PAUSE), mine) == []
