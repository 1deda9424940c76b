"""Every job of a node: its name, when it is due, and the operation that it calls, which is the one that the CLI calls.

A new job is one line here. Whoever runs it, its run is locked, timed and recorded by `perform`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvctl.engine.collect import Collector
from hvctl.engine.nodelock import job_lock
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, NotFoundError
from hvctl.model.job import JobPause, JobRun, RunState
from hvctl.operations import away, collect, mend, restarts
from hvctl.settings import Settings

SLACK = 0.5
"""Seconds that a job may run early: a timer that fires each minute must not find it due a moment later."""

ONCE_LONGEST = 900.0
"""Seconds between two readings that make a sample when cron or a timer collects, and no daemon."""


@dataclass(frozen=True, slots=True)
class Node:
    """What jobs work with; what they remember between their runs is there as long as the process is."""

    engine: Engine
    collector: Collector
    remembered: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """every is seconds; run returns in words what it did. action: it changes something, and a pause of every automatic
    action stops it."""

    name: str
    does: str
    every: Callable[[Settings], float]
    run: Callable[[Node], str]
    action: bool = True


def _forecast(node: Node) -> str:
    # Whoever only lists or pauses jobs does not load numpy, and neither does a node whose forecasts are paused.
    from hvctl.operations.recent import Recent
    from hvctl.operations.refresh import refresh

    recent: Recent = node.remembered.setdefault("recent", Recent())
    return refresh(node.engine, recent.series(node.engine))


def _guard(engine: Engine) -> str:
    # Nobody is guarded on most nodes.
    from hvctl.operations.guard import cycle

    return cycle(engine)


def _retrain(engine: Engine) -> str:
    from hvctl.operations.retrain import retrain

    return retrain(engine)


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "recover",
            "ends operations whose owner died",
            lambda s: s.recover_interval,
            lambda n: mend.recover(n.engine),
        ),
        Job(
            "collect",
            "measures what VMs use",
            lambda s: s.collect_interval,
            lambda n: str(collect.cycle(n.collector)),
            action=False,
        ),
        Job(
            "roll-up",
            "makes five-minute rows, removes old ones",
            lambda s: s.roll_up_interval,
            lambda n: collect.roll_up(n.engine),
            action=False,
        ),
        Job(
            "restarts",
            "remembers what VMs needed after their starts",
            lambda s: s.roll_up_interval,
            lambda n: restarts.learn(n.engine),
            action=False,
        ),
        Job(
            "pool",
            "follows what is reserved: what decays, what ends, what is used",
            lambda s: s.collect_interval,
            lambda n: away.account(n.engine),
            action=False,
        ),
        Job(
            "demands",
            "begins interruptions whose time has come",
            lambda s: s.recover_interval,
            lambda n: away.demands(n.engine),
        ),
        Job(
            "returns",
            "brings interrupted VMs back that are due",
            lambda s: s.recover_interval,
            lambda n: away.returns(n.engine),
        ),
        Job(
            "guard",
            "looks after guarded VMs, and resets a part before something runs out",
            lambda s: s.collect_interval,
            lambda n: _guard(n.engine),
        ),
        Job(
            "reconcile",
            "mends what drifted from its promise",
            lambda s: s.reconcile_interval,
            lambda n: mend.reconcile(n.engine),
        ),
        Job(
            "forecast",
            "forecasts what VMs will need",
            lambda s: s.forecast_interval,
            _forecast,
            action=False,
        ),
        Job(
            "retrain",
            "trains a model on this node's record",
            lambda s: s.retrain_interval,
            lambda n: _retrain(n.engine),
        ),
    )
}


def find(name: str, jobs: Mapping[str, Job] = JOBS) -> Job:
    if name not in jobs:
        raise NotFoundError(f"there is no job {name!r}.", f"there are: {', '.join(jobs)}")
    return jobs[name]


def pause_of(job: Job, pauses: list[JobPause]) -> JobPause | None:
    """What stops a job: a pause of its own, or that of every automatic action."""
    return next((p for p in pauses if p.job == job.name or (p.job is None and job.action)), None)


def due(job: Job, settings: Settings, last: JobRun | None, now: float) -> bool:
    """A run in the future says that the clock was set back."""
    if last is None or last.started_at > now + SLACK:
        return True
    return last.started_at + job.every(settings) <= now + SLACK


def perform(job: Job, node: Node, by: str) -> JobRun:
    """One run, recorded. What goes wrong in it is in the answer, and so is that the database took no record of it."""
    started, began = time.time(), time.monotonic()
    state, detail = RunState.DONE, ""
    try:
        with job_lock(Path(node.engine.settings.run_dir), job.name):
            detail = job.run(node)
    except BusyError as e:
        state, detail = RunState.BUSY, e.message
    except HvctlError as e:
        state, detail = RunState.FAILED, e.message
    except Exception as e:
        # A fault of hvctl's own must end neither the other jobs nor this one's next turn.
        state, detail = RunState.FAILED, f"{type(e).__name__}: {e}"
    run = JobRun(job.name, started, time.monotonic() - began, state, detail, by)
    try:
        node.engine.store.jobs.record(node.engine.facts.name, run)
    except HvctlError as e:
        node.engine.progress(f"{job.name}: its run is not recorded: {e.message}")
    return run


@contextmanager
def by_hand(engine: Engine, longest: float | None = None) -> Iterator[Node]:
    """A node for runs outside of a daemon: its collector goes on from the reading that the last process left."""
    folder = Path(engine.settings.run_dir)
    collector = Collector(engine, longest)
    collector.recall(folder)
    yield Node(engine, collector)
    collector.remember(folder)
