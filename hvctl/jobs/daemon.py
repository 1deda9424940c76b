"""The node's daemon: runs each job of the catalog when it is due, until it is told to end. The one door to APScheduler.

Each job has a thread and an engine of its own: a reconciliation that waits for a guest delays no collection.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from hvctl.engine.collect import Collector
from hvctl.engine.nodelock import node_lock
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import HvctlError
from hvctl.jobs.catalog import JOBS, Job, Node, pause_of, perform
from hvctl.model.job import RunState
from hvctl.settings import Settings
from hvctl.units import format_time

WATCH_SECONDS = 5.0
JUMP = 2.0
"""Seconds by which the wall clock, which the scheduler goes by, may differ from the steady one in a watch."""

Say = Callable[[str], None]


def run(settings: Settings, say: Say, jobs: Mapping[str, Job] = JOBS, stop: threading.Event | None = None) -> None:
    """Until SIGTERM or SIGINT (or `stop`): then the jobs that run end, what is kept is written, and it returns.
    BusyError with the pid of another daemon of this host; UnreachableError if libvirt or the database is not there at
    the start (later that is a failed run of a job)."""
    stop, say = stop or threading.Event(), _stamped(say)
    logging.getLogger("apscheduler").addHandler(logging.NullHandler())
    with ExitStack() as opened:
        lock = opened.enter_context(node_lock(Path(settings.run_dir)))
        opened.callback(_listen(stop))
        daemon = Daemon(settings, say, jobs, opened)
        lock.name_host(daemon.host)
        daemon.start()
        try:
            daemon.watch(stop)
        finally:
            daemon.end()


def _stamped(say: Say) -> Say:
    """Each line with its time, RFC 3339 in UTC: a log outlives whoever watched it."""
    return lambda text: say(f"{format_time(time.time())} {text}")


def _listen(stop: threading.Event) -> Callable[[], None]:
    """Have the signals that end a daemon set the flag; what gives them back their old meaning."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def heard(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


class Daemon:
    """The scheduler with its jobs. Engines are closed by `opened`, in the thread that ends the daemon."""

    def __init__(self, settings: Settings, say: Say, jobs: Mapping[str, Job], opened: ExitStack) -> None:
        self._settings, self._say, self._jobs, self._opened = settings, say, jobs, opened
        self._engines: dict[str, Engine] = {}
        self._remembered: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._engine = opened.enter_context(open_engine(settings, say))
        self.host = self._engine.facts.name
        self._collector = Collector(self._engine)
        self._collector.recall(Path(settings.run_dir))
        self._scheduler = BackgroundScheduler(
            executors={name: ThreadPoolExecutor(1) for name in jobs},
            job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None},
            timezone=UTC,
        )

    def start(self) -> None:
        every = ", ".join(f"{j.name} {j.every(self._settings):g} s" for j in self._jobs.values())
        self._say(f"node {self.host}: pid {os.getpid()}, {every}")
        for lack in self._engine.host.meter.lacks():
            self._say(f"absent here: {lack}")
        for job in self._jobs.values():
            self._scheduler.add_job(
                self._turn,
                IntervalTrigger(seconds=job.every(self._settings), timezone=UTC),
                args=(job,),
                id=job.name,
                executor=job.name,
                next_run_time=datetime.now(UTC),
            )
        self._scheduler.start()

    def watch(self, stop: threading.Event) -> None:
        """Until the flag is set. Set back by an hour, the wall clock would have every job wait for an hour."""
        while True:
            wall, steady = time.time(), time.monotonic()
            if stop.wait(WATCH_SECONDS):
                return
            jump = (time.time() - wall) - (time.monotonic() - steady)
            if abs(jump) > JUMP:
                self._say(f"the clock jumped by {jump:+.0f} s")
                for job in self._jobs:
                    self._scheduler.modify_job(job, next_run_time=datetime.now(UTC))

    def end(self) -> None:
        self._say("ending: waits for the jobs that run")
        self._scheduler.shutdown(wait=True)
        try:
            self._collector.flush()
        except HvctlError as e:
            self._say(f"the last samples are lost: {e.message}")
        try:
            self._collector.remember(Path(self._settings.run_dir))
        except OSError as e:
            self._say(f"the last reading is lost: {e}")
        self._say("ended")

    def _turn(self, job: Job) -> None:
        """One run of a job in its own thread. Nothing may leave it: the scheduler would only log it."""
        try:
            engine = self._engine_of(job)
            if pause_of(job, engine.store.jobs.pauses(self.host)):
                return
        except HvctlError as e:
            # Whether a job is paused is not known then, and so nothing acts; collection knows how to wait.
            if job.action or job.name not in self._engines:
                self._tell(job, f"cannot run: {e.message}")
                return
        run = perform(job, Node(engine, self._collector, self._remembered), "daemon")
        self._tell(job, "" if run.state is RunState.DONE else f"{run.state}: {run.detail}")
        if run.state is RunState.DONE and "kept" in run.detail:
            self._say(f"{job.name}: {run.detail}")

    def _engine_of(self, job: Job) -> Engine:
        if job.name == "collect":
            return self._engines.setdefault(job.name, self._engine)
        if job.name not in self._engines:
            # Nobody else opens it: a job has one thread.
            self._engines[job.name] = self._opened.enter_context(open_engine(self._settings, self._say))
        return self._engines[job.name]

    def _tell(self, job: Job, fault: str) -> None:
        """Say a fault once, and once that it is over."""
        before = self._faults.get(job.name, "")
        self._faults[job.name] = fault
        if fault and fault != before:
            self._say(f"{job.name}: {fault}")
        elif before and not fault:
            self._say(f"{job.name}: works again")
