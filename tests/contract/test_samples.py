"""Samples, series, events, runs and pauses on both databases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from hvctl.adapters.store import samples as module
from hvctl.adapters.store.store import Store
from hvctl.decide.rollup import cutoffs
from hvctl.model.job import JobRun, RunState
from hvctl.model.restart import Restart
from hvctl.model.sample import ROLLED_COLUMNS, EventKind, Sample, VmEvent
from tests.contract.stores import HOST, database_url, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

START = 1_800_000_000
OTHER = "node2"


def sample(vm: str, at: int, **values: Any) -> Sample:
    return Sample(f"uuid-{vm}", vm, at, 10.0, **values)


def fill(store: Store, vm: str = "a", host: str = HOST, slots: int = 2, start: int = START) -> None:
    """A sample each ten seconds whose CPU is the number of the sample in its slot."""
    made = [sample(vm, start + 10 * (i + 1), cpu=float(i % 30), vcpus=2, memory=2.0**30) for i in range(30 * slots)]
    store.samples.add(host, made)


def rolled(store: Store, **asked: Any) -> list[tuple[Any, ...]]:
    columns = ("count", "cpu_mean", "cpu_max", "cpu_p95")
    found = store.samples.series(0, 2**40, **{"host": HOST, "columns": columns, **asked})
    return list(zip(*(found[n] for n in ("uuid", "at", *columns)), strict=True))


def test_a_sample_comes_back_as_it_was(store: Store) -> None:
    names = Sample._fields[4:-1]
    full = sample("a", START, **{name: float(i) for i, name in enumerate(names)})
    store.samples.add(HOST, [full, sample("b", START)])
    assert sorted(store.samples.latest(HOST, 0)) == sorted([full, sample("b", START)], key=lambda s: s[0])


def test_the_same_moment_twice_is_stored_once(store: Store) -> None:
    store.samples.add(HOST, [sample("a", START, cpu=1.0)])
    store.samples.add(HOST, [sample("a", START, cpu=2.0)])
    assert [s.cpu for s in store.samples.latest(HOST, 0)] == [1.0]


def test_hosts_do_not_mix(store: Store) -> None:
    fill(store)
    fill(store, host=OTHER)
    store.samples.roll_up(HOST, START + 10_000)
    assert len(store.samples.latest(HOST, 0)) == len(store.samples.latest(OTHER, 0)) == 60
    assert len(rolled(store)) == 2
    assert rolled(store, host=OTHER) == []
    store.samples.prune(HOST, START + 10_000, START + 10_000)
    assert store.samples.latest(HOST, 0) == []
    assert len(store.samples.latest(OTHER, 0)) == 60
    assert store.samples.observed(HOST) == {}
    assert list(store.samples.observed(OTHER)) == ["uuid-a"]


def test_a_vm_that_was_renamed_keeps_its_samples(store: Store) -> None:
    store.samples.add(HOST, [sample("a", START)])
    store.samples.add(HOST, [sample("a", START + 10)._replace(name="z")])
    assert [s.name for s in store.samples.latest(HOST, 0)] == ["z", "z"]
    assert store.samples.observed(HOST) == {"uuid-a": {"name": "z", "job_type": None}}


def test_roll_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    for vm in ("a", "b", "c"):
        fill(store, vm)
    assert store.samples.roll_up(HOST, START + 599) == 3
    assert store.samples.roll_up(HOST, START + 599) == 0
    assert store.samples.roll_up(HOST, START + 600) == 3
    expected = [(f"uuid-{vm}", START + 300 * i, 30, 14.5, 29, 27.55) for vm in ("a", "b", "c") for i in range(2)]
    assert [(*r[:2], *(pytest.approx(v) for v in r[2:])) for r in expected] == rolled(store)


def test_samples_that_came_late_change_their_slot(store: Store) -> None:
    fill(store, slots=3)
    store.samples.roll_up(HOST, START + 900)
    late = [sample("a", START + 301, cpu=1000.0)]
    store.samples.add(HOST, late, now=START + 900)
    store.samples.roll_up(HOST, START + 900)
    assert [(r[1], r[2], r[4]) for r in rolled(store)] == [
        (START, 30, 29), (START + 300, 31, 1000), (START + 600, 30, 29),
    ]  # fmt: skip


def test_after_a_gap_of_days_only_slots_with_samples_are_rolled_up(store: Store) -> None:
    fill(store, slots=1)
    fill(store, slots=1, start=START + 86400 * 30)
    assert store.samples.roll_up(HOST, START + 86400 * 31) == 2


def test_raw_goes_after_hours_and_rolled_up_after_days(store: Store) -> None:
    hour, day = 3600, 86400
    now = START + 100 * day
    ages = (now - 100 * day, now - 91 * day, now - 89 * day, now - 49 * hour, now - 47 * hour, now - 600)
    for start in ages:
        fill(store, slots=1, start=start)
    store.samples.roll_up(HOST, now)
    store.samples.add(HOST, (), [VmEvent("uuid-a", "a", EventKind.START, float(at)) for at in ages])
    gone = store.samples.prune(HOST, *cutoffs(now, 48, 90))
    assert gone == 4 * 30 + 2 + 2
    assert {s.at // hour * hour for s in store.samples.latest(HOST, 0)} == {a // hour * hour for a in ages[4:]}
    assert [r[1] for r in rolled(store)] == [a // 300 * 300 for a in ages[2:]]
    assert [e["at"] for e in store.samples.events(HOST, 0)] == list(ages[2:])


def test_the_cutoffs_cut_no_slot_in_two(store: Store) -> None:
    fill(store, slots=4)
    store.samples.prune(HOST, *cutoffs(START + 48 * 3600 + 450, 48, 90))
    assert min(s.at for s in store.samples.latest(HOST, 0)) == START + 310


def test_a_vm_of_which_nothing_is_left_is_forgotten_and_may_return(store: Store) -> None:
    fill(store, slots=1)
    store.samples.prune(HOST, START + 10_000, START + 10_000)
    assert store.samples.observed(HOST) == {}
    fill(store, slots=1, start=START + 20_000)
    assert len(store.samples.latest(HOST, 0)) == 30


def test_series_between_two_times_of_some_vms(store: Store) -> None:
    for vm in ("a", "b"):
        fill(store, vm, slots=3)
    store.samples.roll_up(HOST, START + 10_000)
    found = store.samples.series(START + 300, START + 600, uuids=["uuid-b"])
    assert set(found) == {"uuid", "at", *ROLLED_COLUMNS}
    assert (found["uuid"], found["at"], found["count"]) == (["uuid-b"], [START + 300], [30])
    assert (found["vcpus"], found["memory"], found["disk_reads_mean"]) == ([2], [2**30], [None])
    assert store.samples.series(0, START)["at"] == []


def test_series_go_out_and_in_again(store: Store) -> None:
    fill(store, slots=3)
    store.samples.roll_up(HOST, START + 10_000)
    out = store.samples.series(0, 2**40, host=HOST)
    assert store.samples.put_series(OTHER, {"uuid-a": "a"}, out) == 3
    assert store.samples.series(0, 2**40, host=OTHER) == out
    assert store.samples.put_series(OTHER, {}, {"uuid": ["x"], "at": [START + 7], "cpu_mean": [1.5]}) == 1
    assert rolled(store, host=OTHER, uuids=["x"]) == [("x", START, None, 1.5, None, None)]


def test_an_event_of_the_journal_is_stored_once(store: Store) -> None:
    event = VmEvent("uuid-a", "a", EventKind.RESET, 5.0, "to clean", 7)
    store.samples.add(HOST, (), [event])
    store.samples.add(HOST, (), [event, VmEvent("uuid-a", "a", EventKind.STOP, 6.0)])
    assert [(e["kind"], e["operation"]) for e in store.samples.events(HOST, 0, "uuid-a")] == [
        ("reset", 7), ("stop", None),
    ]  # fmt: skip
    assert store.samples.events(HOST, 5.5, "uuid-a")[0]["kind"] == "stop"
    assert store.samples.events(HOST, 0, "uuid-b") == []


def test_text_that_is_no_text_is_stored(store: Store) -> None:
    store.samples.add(HOST, [sample("a", START)._replace(name="a\ud800\0")])
    assert [s.name for s in store.samples.latest(HOST, 0)] == ["a\ufffd\ufffd"]


def test_runs_of_jobs(store: Store) -> None:
    runs = [JobRun(job, float(i), 0.5, RunState.DONE, f"run {i}", "daemon") for i, job in enumerate("xyxyx")]
    for run in runs:
        store.jobs.record(HOST, run)
    store.jobs.record(OTHER, JobRun("x", 99.0, 0.5, RunState.FAILED))
    assert [r.detail for r in store.jobs.history(HOST)] == ["run 4", "run 3", "run 2", "run 1", "run 0"]
    assert [r.detail for r in store.jobs.history(HOST, "y", 1)] == ["run 3"]
    assert {job: run.detail for job, run in store.jobs.last(HOST).items()} == {"x": "run 4", "y": "run 3"}
    assert store.jobs.prune(HOST, 2.0) == 3
    assert len(store.jobs.history(HOST)) == 2
    assert store.jobs.last(OTHER)["x"].state is RunState.FAILED


def test_quick_runs_that_say_the_same_are_folded(store: Store) -> None:
    """All but the first and the last; what changed or failed has a row of its own, and so has what is rare."""

    def ran(at: float, detail: str = "nothing", state: RunState = RunState.DONE, by: str = "daemon") -> None:
        store.jobs.record(HOST, JobRun("x", at, 0.5, state, detail, by))

    for at in range(0, 100, 10):
        ran(float(at))
        store.jobs.record(HOST, JobRun("y", float(at), 0.5, RunState.DONE, f"run {at}", "daemon"))
    assert [r.started_at for r in store.jobs.history(HOST, "x")] == [90.0, 0.0]
    assert len(store.jobs.history(HOST, "y")) == 10
    ran(100.0, "1 done")
    for at in (110.0, 120.0, 130.0):
        ran(at, "failed", RunState.FAILED)
    for at in (140.0, 150.0, 160.0):
        ran(at)
    ran(170.0, by="ann")
    assert [r.started_at for r in store.jobs.history(HOST, "x")] == [
        170.0, 160.0, 140.0, 130.0, 120.0, 110.0, 100.0, 90.0, 0.0,
    ]  # fmt: skip
    for at in (1000.0, 1300.0, 1600.0):
        ran(at)
    assert len(store.jobs.history(HOST, "x")) == 12
    assert store.jobs.last(HOST)["x"].started_at == 1600.0


def test_pauses(store: Store) -> None:
    store.jobs.pause(HOST, None, "ann", 1.0)
    store.jobs.pause(HOST, "collect", "bob", 2.0)
    store.jobs.pause(HOST, "collect", "eve", 3.0)
    assert [(p.job, p.who) for p in store.jobs.pauses(HOST)] == [(None, "ann"), ("collect", "bob")]
    assert store.jobs.pauses(OTHER) == []
    assert store.jobs.resume(HOST, None)
    assert not store.jobs.resume(HOST, None)
    assert [p.job for p in store.jobs.pauses(HOST)] == ["collect"]


def test_samples_lie_in_the_order_of_time(url: str, store: Store) -> None:
    """On SQLite in the table itself, so that a cycle appends: no second copy of the key, no rowid."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has heaps")
    with engine.connect() as connection:
        made = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE name LIKE '%\\_sample' ESCAPE '\\'"))
        assert {name: "WITHOUT ROWID" in sql for name, sql in made} == {"raw_sample": True, "rolled_sample": True}


def test_a_restart_is_remembered_once_by_its_host(store: Store) -> None:
    short = Restart("uuid-a", "micro", START + 0.25, 60.5, 300, {"cpu": 1.5}, {"cpu": 0.5}, {"cpu": 0.25})
    long = replace(short, span=3600, gap=None, image=None, before={})
    store.restarts.add(HOST, [short, long])
    store.restarts.add(HOST, [replace(short, peak={"cpu": 9.0})])
    assert sorted(store.restarts.of(HOST), key=lambda r: r.span) == [short, long]
    assert store.restarts.of(HOST, 300) == [short]
    assert store.restarts.of(HOST, since=START + 1) == []
    assert store.restarts.of(OTHER) == []
    store.restarts.add(HOST, [])
