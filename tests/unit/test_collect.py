"""The collector on a fake host: what it writes, what it keeps while the database does not take it, what it survives."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.adapters.store import database
from hvctl.engine import collect
from hvctl.engine.collect import Collector
from hvctl.engine.operate import Engine
from hvctl.errors import DeadlineError, UnreachableError
from hvctl.model.pool import Rung
from hvctl.model.sample import EventKind, Sample
from hvctl.operations import comeback, interrupt
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from unit.poolhost import add


@pytest.fixture
def collector(site: FakeSite, engine: Engine) -> Collector:
    site.world.pass_time(0)
    return Collector(engine)


def stored(engine: Engine) -> list[Sample]:
    return engine.store.samples.latest(engine.facts.name, 0)


def events(engine: Engine) -> list[tuple[str, str]]:
    return [(e["vm_name"], e["kind"]) for e in engine.store.samples.events(engine.facts.name, 0)]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else writes, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, site: FakeSite) -> Iterator[Engine]:
    """An engine whose database does not wait for a lock."""
    from hvctl.adapters.fake import open_fake
    from hvctl.adapters.store.store import Store

    monkeypatch.setattr(database, "WAIT", 0)
    site.world.pass_time(0)
    with Store(site.settings.database) as store:
        yield Engine(site.settings, open_fake(site.world.uri), store)


def test_a_cycle_writes_what_was_used_since_the_one_before(
    site: FakeSite, engine: Engine, collector: Collector
) -> None:
    site.world.add_vm("a", vcpus=2, memory=512 << 20)
    site.world.add_vm("off", running=False)
    first = collector.cycle()
    assert (first.vms, first.samples, first.gap) == (1, 0, "there is no earlier reading")
    site.world.pass_time(10)
    site.world.work("a", cpu=5 * 10**9, steal=10**9, writes=50, write_bytes=10**6, rx_bytes=2000, rx_packets=20)
    assert collector.cycle().samples == 1
    (sample,) = stored(engine)
    assert (sample.name, sample.at, sample.seconds) == ("a", 1_800_000_010, 10)
    assert (sample.cpu, sample.steal, sample.disk_writes, sample.disk_write_bytes) == (0.5, 0.1, 5, 10**5)
    assert (sample.net_rx_bytes, sample.net_rx_packets, sample.vcpus, sample.memory) == (200, 2, 2, 512 << 20)
    assert (sample.memory_used, sample.memory_usable) == (64 << 20, 448 << 20)
    assert (sample.stall_cpu, sample.cycles, sample.connections) == (None, None, None)


def test_starts_stops_and_resets_are_events(site: FakeSite, engine: Engine, collector: Collector) -> None:
    vm = site.world.add_vm("a")
    collector.cycle()
    snapshots.take(engine, "a", "clean")
    site.world.pass_time(10)
    collector._journal_from = 0  # the journal goes by the machine's clock, and this world's is another
    done = snapshots.reset(engine, "a", "clean")
    collector.cycle()
    assert events(engine) == [("a", "reset")]
    site.world.pass_time(10)
    collector._journal_from = 0
    site.world.add_vm("b")
    site.world.destroy("a")
    collector.cycle()
    found = engine.store.samples.events(engine.facts.name, 0)
    assert sorted((e["vm_name"], e["kind"]) for e in found) == [("a", "reset"), ("a", "stop"), ("b", "start")]
    reset, stop = (next(e for e in found if e["kind"] == kind) for kind in ("reset", "stop"))
    assert (reset["operation"], reset["vm_uuid"]) == (done.operation, vm)
    assert stop["detail"] == "destroyed"


def test_interruptions_and_returns_are_events(site: FakeSite, engine: Engine, collector: Collector) -> None:
    add(site, "a")
    interrupt.vms(engine, ["a"], Rung.PAUSE, back=0.0, grace=0.0, reason="a test")
    comeback.resume(engine, ["a"])
    collector._journal_from = 0  # as above
    collector.cycle()
    found = engine.store.samples.events(engine.facts.name, 0)
    assert [(e["kind"], e["detail"]) for e in found] == [("interruption", "pause"), ("restart", "pause")]


def test_a_reset_that_was_refused_is_no_event(site: FakeSite, engine: Engine, collector: Collector) -> None:
    site.world.add_vm("a")
    snapshots.take(engine, "a", "clean")
    site.world.fail("load_state", "GuestError")
    with pytest.raises(Exception, match="scripted"):
        snapshots.reset(engine, "a", "clean")
    collector._journal_from = 0
    collector.cycle()
    assert events(engine) == []


def test_a_restart_is_a_gap_and_two_events(site: FakeSite, engine: Engine, collector: Collector) -> None:
    site.world.add_vm("a")
    site.world.work("a", cpu=10**12)
    collector.cycle()
    site.world.pass_time(10)
    site.world.destroy("a")
    site.world.start("a")
    site.world.work("a", cpu=10**13)
    assert collector.cycle().samples == 0
    site.world.pass_time(10)
    collector.cycle()
    assert [s.cpu for s in stored(engine)] == [0]
    assert events(engine) == [("a", "stop"), ("a", "start")]


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_clock_that_jumps_costs_one_sample(site: FakeSite, engine: Engine, collector: Collector, jump: float) -> None:
    site.world.add_vm("a")
    collector.cycle()
    for step in (0, jump, 0):
        site.world.pass_time(10, step)
        site.world.work("a", cpu=10**10)
        collector.cycle()
    assert [s.cpu for s in stored(engine)] == [1, 1]
    assert sorted(s.at for s in stored(engine)) == sorted((1_800_000_010, 1_800_000_030 + jump))


@pytest.mark.parametrize("error", ["DeadlineError", "UnreachableError"])
def test_libvirt_that_does_not_answer_costs_its_cycle(
    site: FakeSite, engine: Engine, collector: Collector, error: str
) -> None:
    site.world.add_vm("a")
    collector.cycle()
    site.world.pass_time(10)
    site.world.fail("read_meter", error)
    with pytest.raises((DeadlineError, UnreachableError)):
        collector.cycle()
    site.world.pass_time(10)
    site.world.work("a", cpu=10**10)
    assert collector.cycle().samples == 1
    assert [(s.seconds, s.cpu) for s in stored(engine)] == [(20, 0.5)]


def test_more_than_one_missed_cycle_is_a_gap(site: FakeSite, engine: Engine, collector: Collector) -> None:
    site.world.add_vm("a")
    collector.cycle()
    site.world.pass_time(30)
    assert "30 s lie between" in (collector.cycle().gap or "")
    site.world.pass_time(10)
    assert collector.cycle().samples == 1


def test_a_slow_look_is_no_sample_and_the_next_but_one_is(site: FakeSite, engine: Engine, collector: Collector) -> None:
    site.world.add_vm("a")
    found = []
    for slow in (0, 4, 0, 0):
        site.world.set_slow(slow)
        found.append(collector.cycle().samples)
        site.world.pass_time(10)
    assert found == [0, 0, 0, 1]


def test_a_locked_database_costs_no_sample(site: FakeSite, impatient: Engine) -> None:
    collector = Collector(impatient)
    site.world.add_vm("a")
    collector.cycle()
    with locked(site.folder / "hvctl.db"):
        for _ in range(2):
            site.world.pass_time(10)
            cycle = collector.cycle()
        assert (cycle.samples, cycle.kept) == (0, 2)
        assert "locked by another process" in str(cycle)
    site.world.pass_time(10)
    site.world.add_vm("b")
    cycle = collector.cycle()
    assert (cycle.samples, cycle.kept, cycle.fault) == (3, 0, None)
    assert [s.at for s in stored(impatient)] == [1_800_000_010, 1_800_000_020, 1_800_000_030]
    assert events(impatient) == [("b", "start")]


def test_what_is_kept_has_a_bound(site: FakeSite, impatient: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MOST_KEPT", 3)
    collector = Collector(impatient)
    site.world.add_vm("a")
    collector.cycle()
    lost = 0
    with locked(site.folder / "hvctl.db"):
        for _ in range(5):
            site.world.pass_time(10)
            lost += collector.cycle().lost
    assert lost == 2
    assert collector.flush() == (3, 0)
    assert [s.at for s in stored(impatient)] == [1_800_000_030, 1_800_000_040, 1_800_000_050]


def test_late_samples_are_rolled_up_too(site: FakeSite, impatient: Engine) -> None:
    """Those of a slot that was rolled up without them."""
    host, samples = impatient.facts.name, impatient.store.samples
    collector = Collector(impatient)
    site.world.add_vm("a")
    collector.cycle()
    site.world.pass_time(10)
    collector.cycle()
    with locked(site.folder / "hvctl.db"):
        for _ in range(29):
            site.world.pass_time(10)
            collector.cycle()
    samples.roll_up(host, 1_800_000_400)
    assert samples.series(0, 2**40, host=host)["count"] == [1]
    site.world.pass_time(300)
    collector.cycle()
    samples.roll_up(host, 1_800_000_610)
    assert samples.series(0, 2**40, host=host)["count"] == [30]


def test_the_next_process_goes_on_from_the_last_reading(site: FakeSite, engine: Engine, tmp_path: Path) -> None:
    site.world.pass_time(0)
    site.world.add_vm("a")
    first = Collector(engine)
    first.cycle()
    first.remember(tmp_path / "run")
    site.world.pass_time(60)
    site.world.work("a", cpu=3 * 10**10)
    again = Collector(engine, longest=900.0)
    again.recall(tmp_path / "run")
    assert again.cycle().samples == 1
    assert [(s.seconds, s.cpu) for s in stored(engine)] == [(60, 0.5)]


@pytest.mark.parametrize("content", [b"", b"{", b'{"at": 1}', b"[]", b"\xff"])
def test_a_spoiled_reading_is_none(engine: Engine, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reading.json").write_bytes(content)
    collector = Collector(engine)
    collector.recall(tmp_path)
    assert collector.cycle().gap == "there is no earlier reading"


def test_what_kind_of_job_a_vm_runs_is_taken_from_its_label(site: FakeSite, engine: Engine) -> None:
    from unit.enginehost import add_image, new_vm

    add_image(site)
    verbs.create(engine, new_vm("a", labels={"job-type": "ci", "team": "x"}))
    verbs.create(engine, new_vm("b"))
    site.world.pass_time(0)
    collector = Collector(engine)
    collector.cycle()
    site.world.pass_time(10)
    collector.cycle()
    engine.store.samples.roll_up(engine.facts.name, 0)
    assert {v["name"]: v["job_type"] for v in engine.store.samples.observed(engine.facts.name).values()} == {
        "a": "ci",
        "b": None,
    }


def test_kinds_of_events_are_words_of_the_field() -> None:
    assert set(EventKind) == {"start", "stop", "reset", "load", "interruption", "restart"}


def test_libvirt_down_is_unreachable(site: FakeSite, collector: Collector) -> None:
    site.world.set_libvirt_down(True)
    with pytest.raises(UnreachableError):
        collector.cycle()
