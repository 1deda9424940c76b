"""The catalog of jobs: what is due, what a pause stops, and that one run is recorded whatever becomes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.engine.collect import Collector
from hvctl.engine.nodelock import job_lock, node_lock
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, NotFoundError, UnreachableError
from hvctl.jobs import once
from hvctl.jobs.catalog import JOBS, Job, Node, due, find, pause_of, perform
from hvctl.model.job import JobPause, JobRun, RunState
from hvctl.operations import doctor
from hvctl.settings import Settings, load_settings
from unit.commandline import Run, runner
from unit.enginehost import add_image

MIB = 1 << 20
SETTINGS = Settings()


@pytest.fixture
def node(engine: Engine) -> Node:
    return Node(engine, Collector(engine))


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


def job(name: str = "test", work: Callable[[Node], str] = lambda _: "worked", *, action: bool = True) -> Job:
    return Job(name, "is a test", lambda _: 10.0, work, action)


def test_the_catalog() -> None:
    assert set(JOBS) == {
        "recover", "collect", "roll-up", "restarts", "pool", "demands", "returns", "guard", "reconcile", "forecast",
        "retrain",
    }  # fmt: skip
    assert {name for name, job in JOBS.items() if job.action} == {
        "recover", "demands", "returns", "guard", "reconcile", "retrain",
    }  # fmt: skip
    assert {job.name: job.every(SETTINGS) for job in JOBS.values()} == {
        "recover": 10, "collect": 10, "roll-up": 300, "restarts": 300, "pool": 10, "demands": 10, "returns": 10,
        "guard": 10, "reconcile": 300, "forecast": 300, "retrain": 86400,
    }  # fmt: skip
    with pytest.raises(NotFoundError, match="no job 'colect'"):
        find("colect")


@pytest.mark.parametrize(
    ("paused", "stopped"),
    [
        ([], set()),
        ([None], {"recover", "demands", "returns", "guard", "reconcile", "retrain"}),
        (["collect"], {"collect"}),
        ([None, "collect"], {"recover", "demands", "returns", "guard", "reconcile", "retrain", "collect"}),
        (["roll-up", "recover"], {"roll-up", "recover"}),
    ],
)
def test_what_a_pause_stops(paused: list[str | None], stopped: set[str]) -> None:
    pauses = [JobPause(name, 1.0, "ann") for name in paused]
    assert {name for name, job in JOBS.items() if pause_of(job, pauses)} == stopped


@pytest.mark.parametrize(
    ("started", "expected"),
    [(None, True), (1000.0, False), (990.6, False), (990.4, True), (500.0, True), (5000.0, True)],
)
def test_what_is_due(started: float | None, expected: bool) -> None:
    """A run in the future: the clock was set back since."""
    last = None if started is None else JobRun("test", started, 1.0, RunState.FAILED)
    assert due(job(), SETTINGS, last, 1000.0) is expected


def failing(error: Exception) -> Callable[[Node], str]:
    def work(_: Node) -> str:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "state", "detail"),
    [
        (lambda _: "worked", RunState.DONE, "worked"),
        (failing(HvctlError("it broke.")), RunState.FAILED, "it broke."),
        (failing(BusyError("it is busy.")), RunState.BUSY, "it is busy."),
        (failing(ZeroDivisionError("by zero")), RunState.FAILED, "ZeroDivisionError: by zero"),
    ],
)
def test_every_run_is_recorded(node: Node, work: Callable[[Node], str], state: RunState, detail: str) -> None:
    done = perform(job(work=work), node, "ann")
    (recorded,) = node.engine.store.jobs.history(node.engine.facts.name)
    assert (done.state, done.detail, done.by) == (state, detail, "ann")
    assert replace(recorded, id=None) == done


def test_a_job_runs_once_at_a_time(node: Node, site: FakeSite) -> None:
    with job_lock(Path(site.settings.run_dir), "test"):
        assert perform(job(), node, "ann").state is RunState.BUSY
        assert perform(job("other"), node, "ann").state is RunState.DONE
    assert perform(job(), node, "ann").state is RunState.DONE


def test_a_run_counts_though_nobody_can_record_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnreachableError("the disk is full.")

    monkeypatch.setattr(node.engine.store.jobs, "record", refuse)
    said: list[str] = []
    node.engine.progress = said.append
    assert perform(job(), node, "ann").state is RunState.DONE
    assert "the disk is full" in said[0]


# --- once


def test_once_runs_what_is_due(site: FakeSite, engine: Engine) -> None:
    ran: list[str] = []
    jobs = {n: job(n, lambda _, n=n: ran.append(n) or "ok") for n in ("a", "b")}  # type: ignore[misc]
    said: list[str] = []
    assert [r.job for r in once.run_due(engine, said.append, jobs)] == ["a", "b"]
    assert once.run_due(engine, said.append, jobs) == []
    engine.store.jobs.prune(engine.facts.name, 2**40)
    engine.store.jobs.pause(engine.facts.name, "a", "ann", 1.0)
    assert [r.job for r in once.run_due(engine, said.append, jobs)] == ["b"]
    assert ran == ["a", "b", "b"]
    assert "a: paused by ann" in said


def test_once_beside_a_daemon_is_busy(site: FakeSite, engine: Engine) -> None:
    with node_lock(Path(site.settings.run_dir)), pytest.raises(BusyError, match=rf"pid {os.getpid()}\)"):
        once.run_due(engine, lambda _: None)


def test_two_runs_of_cron_make_a_sample(site: FakeSite, run: Run, engine: Engine) -> None:
    site.world.add_vm("a")
    site.world.pass_time(0)
    assert run("node", "run", "--once").status == 0
    site.world.pass_time(60)
    site.world.work("a", cpu=6 * 10**9)
    assert run("job", "run", "collect").status == 0
    (sample,) = engine.store.samples.latest("fake", 0)
    assert (sample.seconds, sample.cpu) == (60, 0.1)


def test_the_status_of_once_tells_what_failed(site: FakeSite, run: Run) -> None:
    site.world.fail("read_meter", "DeadlineError")
    done = run("-f", "json", "node", "run", "--once")
    assert done.status == 1
    assert "failed: collect" in done.err
    states = {r["job"]: r["state"] for r in json.loads(done.out)["runs"]}
    assert states == {
        "recover": "done",
        "collect": "failed",
        "roll-up": "done",
        "restarts": "done",
        "pool": "done",
        "demands": "done",
        "returns": "done",
        "guard": "done",
        "reconcile": "done",
        "forecast": "done",
        "retrain": "done",
    }


# --- the operations are those of the CLI


def test_reconcile_mends_drift(site: FakeSite, node: Node, run: Run) -> None:
    site.world.add_vm("a")
    assert run("allocate", "a", "--cpu-quota", "50%").status == 0
    assert perform(JOBS["reconcile"], node, "ann").detail == "what was promised is in force"
    site.world.allocate("a", cpu_quota=200)
    assert perform(JOBS["reconcile"], node, "ann").detail == "1 drifts mended"
    assert site.world.vm("a").allocation.cpu_quota == 50


def test_reconcile_leaves_to_a_person_what_is_theirs_and_does_not_fail(
    site: FakeSite, node: Node, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a VM that somebody undefined, the promise goes and the folder stays: as often as it looks."""
    monkeypatch.setattr(doctor, "GONE_SECONDS", 0.0)
    add_image(site)
    for name, start in (("gone", ()), ("a", ("--start",))):
        assert run("vm", "create", name, "--image", "micro", *start).status == 0
    site.world.undefine("gone")
    person = "1 for a person to look at (hvctl doctor --probe drift): gone"
    for said in (f"1 drifts mended; {person}", person, person):
        done = perform(JOBS["reconcile"], node, "ann")
        assert (done.state, done.detail) == (RunState.DONE, said)
    run("allocate", "a", "--cpu-quota", "50%")
    site.world.allocate("a", cpu_quota=200)
    assert perform(JOBS["reconcile"], node, "ann").detail == f"1 drifts mended; {person}"


def test_reconcile_that_is_left_with_drift_fails(site: FakeSite, node: Node, run: Run) -> None:
    site.world.add_vm("a")
    assert run("allocate", "a", "--cpu-quota", "50%").status == 0
    site.world.allocate("a", cpu_quota=200)
    site.world.fail("set_cpu_quota", times=9)
    done = perform(JOBS["reconcile"], node, "ann")
    assert done.state is RunState.FAILED
    assert "drifts are left: a" in done.detail


# --- the commands


def listed(run: Run) -> dict[str, dict[str, object]]:
    return {j["name"]: j for j in json.loads(run("-f", "json", "job", "list").out)["jobs"]}


def test_pause_and_resume(site: FakeSite, run: Run) -> None:
    assert run("job", "pause").status == 0
    assert {n: bool(j["paused"]) for n, j in listed(run).items()} == {
        "recover": True, "collect": False, "roll-up": False, "restarts": False, "pool": False, "demands": True,
        "returns": True, "guard": True, "reconcile": True, "forecast": False, "retrain": True,
    }  # fmt: skip
    assert str(listed(run)["recover"]["paused"]).startswith("by operator since 20")
    assert run("job", "pause", "collect").status == 0
    assert run("job", "resume").err == "resumed: every automatic action\n"
    assert {n for n, j in listed(run).items() if j["paused"]} == {"collect"}
    assert run("job", "resume").err == "was not paused: every automatic action\n"
    assert run("job", "pause", "nonsense").status == 3


def test_jobs_can_be_paused_while_libvirt_does_not_answer(
    site: FakeSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host that the last daemon worked on."""
    from hvctl.operations import node

    def down(_: Settings) -> None:
        raise UnreachableError("libvirt does not answer.")

    assert run("node", "run", "--once").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(node, "open_host", down)
        assert run("job", "pause").status == 0
        assert listed(run)["recover"]["paused"]
    assert listed(run)["recover"]["paused"]


def test_by_hand_a_paused_job_runs(site: FakeSite, run: Run) -> None:
    run("job", "pause", "recover")
    done = run("-f", "json", "job", "run", "recover")
    assert done.status == 0
    (ran,) = json.loads(done.out)["runs"]
    assert (ran["job"], ran["by"], ran["state"]) == ("recover", "operator", "done")
    run("job", "run", "roll-up")
    assert [r["job"] for r in json.loads(run("-f", "json", "job", "history").out)["runs"]] == ["roll-up", "recover"]
    newest = run("-f", "json", "job", "history", "recover", "--limit", "1")
    assert [r["job"] for r in json.loads(newest.out)["runs"]] == ["recover"]
    assert run("job", "history", "nonsense").status == 3


def test_a_job_by_hand_ends_with_what_became_of_it(site: FakeSite, run: Run) -> None:
    site.world.fail("read_meter", "HvctlError")
    failed = run("job", "run", "collect")
    assert (failed.status, "read_meter failed as scripted" in failed.err) == (1, True)
    with job_lock(Path(site.settings.run_dir), "collect"):
        assert run("job", "run", "collect").status == 7


# --- settings


@pytest.mark.parametrize(
    "name", [f.name for f in fields(Settings) if f.name.endswith(("_interval", "_hours", "_days"))]
)
def test_no_interval_is_nothing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(HvctlError, match=name):
            load_settings({}, {**env, f"HVCTL_{name.upper()}": wrong})
    assert getattr(load_settings({}, {**env, f"HVCTL_{name.upper()}": "60"}), name) == 60.0
