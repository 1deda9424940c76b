"""Every job that is due, once: for cron and timers, where no daemon runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hvctl.engine.nodelock import node_lock
from hvctl.engine.operate import Engine
from hvctl.jobs.catalog import JOBS, ONCE_LONGEST, Job, by_hand, due, pause_of, perform
from hvctl.model.job import JobRun


def run_due(engine: Engine, say: Callable[[str], None], jobs: Mapping[str, Job] = JOBS) -> list[JobRun]:
    """The runs, in the catalog's order. BusyError while a daemon runs here: its jobs are not done twice."""
    host, settings = engine.facts.name, engine.settings
    with node_lock(Path(settings.run_dir)) as lock, by_hand(engine, ONCE_LONGEST) as node:
        lock.name_host(host)
        last, pauses = engine.store.jobs.last(host), engine.store.jobs.pauses(host)
        runs = []
        for job in jobs.values():
            if paused := pause_of(job, pauses):
                say(f"{job.name}: paused by {paused.who}")
            elif due(job, settings, last.get(job.name), time.time()):
                runs.append(perform(job, node, "once"))
                say(f"{job.name}: {runs[-1].state}: {runs[-1].detail}")
        return runs
