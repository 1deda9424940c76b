"""From two readings to samples: never a negative rate, never a spike, a gap wherever something is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.rates import JUMP, Used, happened, used
from hvctl.model.meter import DiskCounters, Hardware, NicCounters, Reading, Stalls, VmReading
from hvctl.model.sample import STORED, EventKind, Sample

LONGEST = 25.0
COUNTED = ("cpu", "cpu_busiest", "steal", "disk_reads", "disk_writes", "disk_read_bytes", "disk_write_bytes",
           "net_rx_bytes", "net_tx_bytes", "net_rx_packets", "net_tx_packets", "stall_cpu", "stall_memory", "stall_io",
           "cycles", "instructions", "cache_misses")  # fmt: skip


def vm(life: str = "1", **changed: Any) -> VmReading:
    counters: dict[str, Any] = {
        "cpu": 10**10,
        "vcpu_times": ((0, 10**9), (1, 2 * 10**9)),
        "steal": 10**9,
        "memory": 1 << 28,
        "disks": (DiskCounters("vda", 100, 100, 10**6, 10**6),),
        "nics": (NicCounters("tap0", 10**6, 10**6, 1000, 1000),),
        "stalls": Stalls(10**6, 10**6, 10**6),
        "hardware": Hardware(10**9, 10**9, 10**6),
    }
    return VmReading("u1", "a", life, **counters | changed)


def reading(at: float, *vms: VmReading, clock: float | None = None, took: float = 0.0, boot: str = "b") -> Reading:
    return Reading(1_000_000 + at, at if clock is None else clock, took, boot, vms)


def only(found: Used) -> Sample:
    (sample,) = found.samples
    return sample


def test_rates_are_what_was_added_over_the_time_between() -> None:
    later = vm(
        cpu=10**10 + 5 * 10**9,
        vcpu_times=((0, 2 * 10**9), (1, 6 * 10**9)),
        steal=2 * 10**9,
        available=200,
        usable=50,
        disks=(DiskCounters("vda", 110, 130, 10**6 + 5000, 10**6),),
        nics=(NicCounters("tap0", 10**6 + 20_000, 10**6 + 10, 1000, 1007),),
        stalls=Stalls(2 * 10**6, 10**6, 11 * 10**6),
        hardware=Hardware(2 * 10**9, 10**9 + 10, 10**6),
        uptime=77.4,
    )
    sample = only(used(reading(0, vm()), reading(10, later), LONGEST))
    assert (sample.at, sample.seconds, sample.uptime) == (1_000_010, 10.0, 77)
    assert (sample.cpu, sample.cpu_busiest, sample.steal) == (0.5, 0.4, 0.1)
    assert sample.per_vcpu == ((0, 0.1), (1, 0.4))
    assert (sample.disk_reads, sample.disk_writes, sample.disk_read_bytes, sample.disk_write_bytes) == (1, 3, 500, 0)
    assert (sample.net_rx_bytes, sample.net_tx_bytes, sample.net_tx_packets) == (2000, 1, 0.7)
    assert (sample.stall_cpu, sample.stall_memory, sample.stall_io) == (0.1, 0, 1)
    assert (sample.cycles, sample.instructions, sample.cache_misses) == (10**8, 1, 0)
    assert (sample.memory, sample.memory_used) == (1 << 28, 150)


def test_devices_are_added_up() -> None:
    two = (DiskCounters("vda", 0, 0, 0, 0), DiskCounters("vdb", 0, 0, 0, 0))
    more = (DiskCounters("vda", 10, 20, 30, 40), DiskCounters("vdb", 1000, 2000, 3000, 4000))
    sample = only(used(reading(0, vm(disks=two)), reading(10, vm(disks=more)), LONGEST))
    assert (sample.disk_reads, sample.disk_writes) == (101, 202)
    assert (sample.disk_read_bytes, sample.disk_write_bytes) == (303, 404)


@dataclass(frozen=True)
class Gap:
    before: Reading | None
    now: Reading
    said: str


A, B = vm(), vm(cpu=2 * 10**10)


@pytest.mark.parametrize(
    "gap",
    [
        Gap(None, reading(10, B), "no earlier reading"),
        Gap(reading(0, A), reading(30, B), "30 s lie between"),
        Gap(reading(0, A), reading(10, B, boot="other"), "host was restarted"),
        Gap(reading(10, A), reading(10, B), "no time"),
        Gap(reading(0, A), reading(10, B, clock=-5), "no time"),
        Gap(reading(0, A), reading(3610, B, clock=10), "jumped by +3600 s"),
        Gap(reading(0, A), reading(-3590, B, clock=10), "jumped by -3600 s"),
        Gap(reading(0, A, took=1.0), reading(10, B, took=1.5), "took 2.5 s"),
    ],
)
def test_gaps(gap: Gap) -> None:
    found = used(gap.before, gap.now, LONGEST)
    assert found.samples == ()
    assert gap.said in (found.gap or "")


def test_one_missing_cycle_is_none() -> None:
    assert only(used(reading(0, A), reading(20, B), LONGEST)).cpu == 0.5


@pytest.mark.parametrize("life", ["2", "1:new"])
def test_another_process_is_a_gap_of_its_vm_alone(life: str) -> None:
    other = vm()._replace(uuid="u2", name="b")
    found = used(reading(0, A, other), reading(10, vm(life, cpu=5), other), LONGEST)
    assert [s.uuid for s in found.samples] == ["u2"]
    assert found.gap is None


OTHERS: list[Any] = [
    (),
    (DiskCounters("vdb", 200, 200, 10**7, 10**7),),
    None,
    (DiskCounters("vda", 99, 100, 10**6, 10**6),),
    (DiskCounters("vda", 200, 200, 10**7, 10**7), DiskCounters("vdb", 9, 9, 9, 9)),
]


@pytest.mark.parametrize("disks", OTHERS)
def test_a_disk_that_came_went_or_began_anew_is_a_gap_of_disks_alone(disks: Any) -> None:
    sample = only(used(reading(0, A), reading(10, B._replace(disks=disks)), LONGEST))
    assert (sample.disk_reads, sample.disk_writes, sample.disk_read_bytes, sample.disk_write_bytes) == (None,) * 4
    assert (sample.cpu, sample.net_rx_bytes) == (1.0, 0)


def test_what_is_not_told_is_not_zero() -> None:
    bare = VmReading("u1", "a", "1")
    sample = only(used(reading(0, bare), reading(10, bare), LONGEST))
    assert [getattr(sample, name) for name in STORED[1:]] == [None] * (len(STORED) - 1)


def test_a_vcpu_that_was_plugged_has_no_rate_yet() -> None:
    later = vm(vcpu_times=((0, 10**9), (1, 3 * 10**9), (2, 10**12)))
    assert only(used(reading(0, A), reading(10, later), LONGEST)).per_vcpu == ((0, 0.0), (1, 0.1))


# --- any course of events

counts = st.integers(0, 10**12)
disks = st.lists(st.builds(DiskCounters, st.sampled_from(("vda", "vdb")), counts, counts, counts, counts), max_size=2)
nics = st.lists(st.builds(NicCounters, st.just("tap0"), counts, counts, counts, counts), max_size=1)
readings_of_vms = st.builds(
    VmReading,
    st.sampled_from(("u1", "u2", "u3")),
    st.just("a"),
    st.sampled_from(("life 1", "life 2")),
    uptime=st.none() | st.floats(0, 1e9),
    cpu=st.none() | counts,
    vcpu_times=st.lists(st.tuples(st.integers(0, 2), counts), max_size=3, unique_by=lambda t: t[0]).map(tuple),
    steal=st.none() | counts,
    disks=st.none() | disks.map(tuple),
    nics=st.none() | nics.map(tuple),
    stalls=st.none() | st.builds(Stalls, counts, counts, counts),
    hardware=st.none() | st.builds(Hardware, counts, counts, counts),
)
vms = st.lists(readings_of_vms, max_size=3, unique_by=lambda v: v.uuid).map(tuple)
passing = st.tuples(st.floats(5, 20), st.floats(-1, 1), st.floats(0, 1), st.sampled_from(("boot 1",) * 5 + ("boot 2",)))


@given(st.lists(st.tuples(passing, vms), min_size=2, max_size=6))
def test_no_rate_is_negative_whatever_counters_do(course: list[tuple[Any, Any]]) -> None:
    """Most readings are a cycle apart, so that what they count is what decides."""
    clock = wall = 1000.0
    before: Reading | None = None
    for (seconds, drift, took, boot), found in course:
        clock, wall = clock + seconds, wall + seconds + drift
        now = Reading(wall, clock, took, boot, found)
        for sample in used(before, now, LONGEST).samples:
            assert 0 < sample.seconds <= LONGEST
            values = [getattr(sample, name) for name in COUNTED]
            assert all(v is None or v >= 0 for v in values)
            assert all(v is None or v <= 1 for v in values[11:14])
        before = now


LOWER: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"cpu": 1}, ("cpu",)),
    ({"vcpu_times": ((0, 1), (1, 1))}, ("cpu_busiest",)),
    ({"steal": 1}, ("steal",)),
    ({"disks": (DiskCounters("vda", 100, 100, 1, 10**6),)}, COUNTED[3:7]),
    ({"nics": (NicCounters("tap0", 10**6, 10**6, 1000, 1),)}, COUNTED[7:11]),
    ({"stalls": Stalls(10**6, 1, 10**6)}, ("stall_memory",)),
    ({"hardware": Hardware(10**9, 1, 10**6)}, ("instructions",)),
]


@pytest.mark.parametrize(("changed", "gone"), LOWER)
def test_a_counter_that_began_anew_is_a_gap_of_its_own(changed: dict[str, Any], gone: tuple[str, ...]) -> None:
    sample = only(used(reading(0, A), reading(10, A._replace(**changed)), LONGEST))
    assert {name for name in COUNTED if getattr(sample, name) is None} == set(gone)


def test_a_stall_that_ended_now_and_began_before_is_not_more_than_all_the_time() -> None:
    long = vm(stalls=Stalls(60 * 10**6, 10**6, 10**6))
    assert only(used(reading(0, A), reading(10, long), LONGEST)).stall_cpu == 1


steps = st.tuples(
    st.sampled_from(("run", "run", "run", "reset", "restart", "vanish", "miss", "jump", "slow", "reboot")),
    st.floats(8, 12),
    st.floats(0.0, 1.0),
)


@given(st.lists(steps, min_size=1, max_size=12))
def test_a_vm_that_never_uses_more_than_a_core_is_never_seen_to(course: list[tuple[str, float, float]]) -> None:
    """Whatever is reset, restarted, missed or set between the readings."""
    clock, wall, cpu, life, boot = 100.0, 1e9, 10**12, 1, 1
    before: Reading | None = None
    for event, seconds, busy in course:
        clock += seconds * (4 if event == "miss" else 1)
        wall += seconds * (4 if event == "miss" else 1) + (7200 if event == "jump" else 0)
        cpu += int(busy * seconds * 1e9)
        if event == "reset":
            cpu = int(busy * seconds * 1e9)
        if event in ("restart", "reboot"):
            cpu, life = 10**13, life + 1  # a counter that begins anew, and is larger than before
            boot += event == "reboot"
        vms = () if event == "vanish" else (vm(f"{life}", cpu=cpu),)
        now = Reading(wall, clock, 3.0 if event == "slow" else 0.0, f"{boot}", vms)
        for sample in used(before, now, LONGEST).samples:
            assert sample.cpu is None or sample.cpu <= 1.0 + 1e-3
            assert event not in ("restart", "reboot", "vanish", "jump", "slow")
        before = now


# --- events


def kinds(before: Reading | None, now: Reading) -> list[tuple[str, EventKind]]:
    return [(e.vm_uuid, e.kind) for e in happened(before, now)]


def test_starts_and_stops() -> None:
    other = vm()._replace(uuid="u2")
    assert kinds(None, reading(0, A)) == []
    assert kinds(reading(0, A), reading(10, A)) == []
    assert kinds(reading(0), reading(10, A)) == [("u1", EventKind.START)]
    assert kinds(reading(0, A, other), reading(10, A)) == [("u2", EventKind.STOP)]
    assert kinds(reading(0, A), reading(10, vm("2"))) == [("u1", EventKind.STOP), ("u1", EventKind.START)]
    assert kinds(reading(0, A), reading(40, A, clock=40)) == []


def test_a_start_is_when_the_process_started() -> None:
    (event,) = happened(reading(0), reading(10, vm(uptime=4.0)))
    assert event.at == 1_000_006


def test_a_restart_of_the_host_says_so() -> None:
    stop, start = happened(reading(0, A), reading(900, vm("9"), boot="c"))
    assert (stop.kind, stop.detail) == (EventKind.STOP, "the host was restarted")
    assert start.kind is EventKind.START


@pytest.mark.parametrize("corrected", [-JUMP / 2, JUMP / 2])
def test_a_small_correction_of_the_clock_is_no_jump_and_changes_no_rate(corrected: float) -> None:
    (sample,) = used(reading(0, vm()), reading(10 + corrected, vm(cpu=2 * 10**10), clock=10), LONGEST).samples
    assert (sample.seconds, sample.cpu) == (10.0, 1.0)
