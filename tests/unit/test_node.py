"""The daemon: alone on its host, ended cleanly, and not stopped by what goes wrong in its jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.adapters.store.store import Store
from hvctl.engine.nodelock import last_host, node_lock
from hvctl.errors import BusyError, HvctlError
from hvctl.jobs import daemon
from hvctl.jobs.catalog import JOBS, Job, Node
from hvctl.model.operation import OpState
from hvctl.settings import Settings

SECONDS = 30.0


@contextmanager
def running(site: FakeSite, jobs: dict[str, Job], **changed: object) -> Iterator[list[str]]:
    """A daemon in a thread of the test, ended with it; what it says."""
    stop, said, ended = threading.Event(), [], []  # type: ignore[var-annotated]
    settings = replace(site.settings, **changed)  # type: ignore[arg-type]

    def heard(line: str) -> None:
        stamp, _, text = line.partition(" ")
        assert datetime.fromisoformat(stamp).tzinfo == UTC
        assert stamp.endswith("Z"), "RFC 3339"
        said.append(text)

    def work() -> None:
        try:
            daemon.run(settings, heard, jobs, stop)
        except HvctlError as e:
            ended.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert not ended, ended


def job(name: str, work: Callable[[Node], str], *, action: bool = True, every: float = 0.05) -> Job:
    return Job(name, "is a test", lambda _: every, work, action)


def counted(times: int) -> tuple[Callable[[Node], str], threading.Event]:
    """Work, and a flag that is set when it was done that often."""
    reached, done = threading.Event(), []  # type: ignore[var-annotated]

    def work(_: Node) -> str:
        done.append(1)
        if len(done) >= times:
            reached.set()
        return "worked"

    return work, reached


def test_every_job_runs_again_and_again_whatever_another_does(site: FakeSite) -> None:
    def breaks(_: Node) -> str:
        broken.release()
        raise ZeroDivisionError

    broken = threading.Semaphore(0)
    work, reached = counted(3)
    with running(site, {j.name: j for j in (job("breaks", breaks), job("works", work))}) as said:
        assert reached.wait(SECONDS)
        assert all(broken.acquire(timeout=SECONDS) for _ in range(3))
    assert said.count("breaks: failed: ZeroDivisionError: ") == 1, "a fault is said once"
    with Store(site.settings.database) as store:
        assert [r.detail for r in store.jobs.history("fake", "works")] == ["worked"] * 2, "the first and the last"
        assert len(store.jobs.history("fake", "breaks")) > 2


def test_a_job_that_takes_long_delays_no_other_and_is_not_run_twice(site: FakeSite) -> None:
    inside, most, hold = [], [], threading.Event()  # type: ignore[var-annotated]

    def slow(_: Node) -> str:
        inside.append(1)
        most.append(len(inside))
        hold.wait(SECONDS)
        inside.pop()
        return "slow"

    work, reached = counted(5)
    with running(site, {j.name: j for j in (job("slow", slow), job("quick", work))}):
        assert reached.wait(SECONDS)
        hold.set()
    assert set(most) == {1}


def test_the_job_that_runs_ends_before_the_daemon_does(site: FakeSite) -> None:
    began, go, ended = threading.Event(), threading.Event(), []  # type: ignore[var-annotated]

    def slow(_: Node) -> str:
        began.set()
        go.wait(SECONDS)
        ended.append(1)
        return "ended"

    with running(site, {"slow": job("slow", slow, every=60)}) as said:
        assert began.wait(SECONDS)
        threading.Timer(0.2, go.set).start()
    assert ended == [1]
    assert said[-2:] == ["ending: waits for the jobs that run", "ended"]
    with Store(site.settings.database) as store:
        assert [r.detail for r in store.jobs.history("fake")] == ["ended"]


def test_a_pause_stops_actions_and_not_measuring(site: FakeSite) -> None:
    acted: list[int] = []
    act = job("act", lambda _: acted.append(1) or "acted")  # type: ignore[func-returns-value]
    work, reached = counted(5)
    with Store(site.settings.database) as store:
        store.jobs.pause("fake", None, "ann", 1.0)
        with running(site, {j.name: j for j in (act, job("measure", work, action=False))}):
            assert reached.wait(SECONDS)
            assert acted == []
            store.jobs.resume("fake", None)
            until = time.monotonic() + SECONDS
            while not acted:
                assert time.monotonic() < until
                time.sleep(0.01)


def test_a_fault_is_over_when_it_is(site: FakeSite) -> None:
    site.world.add_vm("a")
    site.world.fail("read_meter", "UnreachableError", nth=2, times=2)
    with running(site, {"collect": replace(JOBS["collect"], every=lambda _: 0.05)}) as said:
        until = time.monotonic() + SECONDS
        while "collect: works again" not in said:
            assert time.monotonic() < until, said
            time.sleep(0.01)
    assert said.count("collect: failed: read_meter failed as scripted.") == 1


def test_the_clock_set_back_by_an_hour_stops_nothing(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler goes by the wall clock, which is why the daemon watches it."""
    moved: list[str] = []

    class Scheduler:
        def modify_job(self, name: str, **_: object) -> None:
            moved.append(name)

    clock = iter([1000.0, 1005.0 - 3600.0, 2000.0])
    steady = iter([10.0, 15.0, 20.0])
    monkeypatch.setattr(daemon.time, "time", lambda: next(clock))
    monkeypatch.setattr(daemon.time, "monotonic", lambda: next(steady))
    waits = iter([False, True])

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return next(waits)

    watched = object.__new__(daemon.Daemon)
    said: list[str] = []
    watched._say, watched._jobs, watched._scheduler = said.append, {"a": None, "b": None}, Scheduler()  # type: ignore
    watched.watch(Stop())
    assert said == ["the clock jumped by -3600 s"]
    assert moved == ["a", "b"]


def test_one_daemon_on_a_host(site: FakeSite) -> None:
    folder = Path(site.settings.run_dir)
    with node_lock(folder) as lock:
        lock.name_host("node1")
        with pytest.raises(BusyError, match=rf"runs already \(pid {os.getpid()}\)"):
            daemon.run(site.settings, lambda _: None, {}, threading.Event())
    assert last_host(folder) == "node1"
    stop = threading.Event()
    stop.set()
    daemon.run(site.settings, lambda _: None, {}, stop)
    assert last_host(folder) == "fake"


@contextmanager
def process(site: FakeSite, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """`hvctl node run` with its first line read."""
    child = subprocess.Popen(
        [sys.executable, "-m", "hvctl", "node", "run"],
        env={**os.environ, **site.environment, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        assert f"Z node fake: pid {child.pid}, recover" in child.stderr.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


def rows(settings: Settings) -> int:
    with Store(settings.database) as store:
        return len(store.samples.latest("fake", 0))


def test_sigterm_ends_it_cleanly(site: FakeSite) -> None:
    site.world.add_vm("a")
    with process(site, HVCTL_COLLECT_INTERVAL="1") as child:
        until = time.monotonic() + SECONDS
        while not rows(site.settings):
            assert time.monotonic() < until
            time.sleep(0.05)
        second = site.run("node", "run")
        assert second.returncode == 7
        assert f"(pid {child.pid})" in second.stderr
        child.terminate()
        _, said = child.communicate(timeout=SECONDS)
        assert child.returncode == 0, said
    assert [line.split(" ", 1)[1] for line in said.splitlines()][-2:] == [
        "ending: waits for the jobs that run",
        "ended",
    ]
    assert (site.folder / "run" / "reading.json").exists()


def test_so_does_ctrl_c_and_what_is_killed_leaves_the_lock_free(site: FakeSite) -> None:
    with process(site) as child:
        child.send_signal(signal.SIGINT)
        child.wait(SECONDS)
        assert child.returncode == 0
    with process(site) as child:
        child.kill()
        child.wait()
    with node_lock(Path(site.settings.run_dir)):
        pass


def test_it_ends_what_a_dead_owner_left(site: FakeSite) -> None:
    site.world.add_vm("a")
    assert site.run("allocate", "a", "--cpu-quota", "50%", fault="allocate:row:after=kill").returncode != 0
    with Store(site.settings.database) as store:
        assert [o.state for o in store.operations()] == [OpState.OPEN]
        with running(site, {"recover": JOBS["recover"]}):
            until = time.monotonic() + SECONDS
            while store.operations()[0].state is OpState.OPEN:
                assert time.monotonic() < until
                time.sleep(0.02)
        assert store.operations()[0].state is OpState.UNDONE
