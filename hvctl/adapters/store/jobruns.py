"""Runs and pauses of a node's jobs, in the database, so that a pause outlives every process that might act."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, insert, select, text

from hvctl.adapters.store.database import Database
from hvctl.adapters.store.sampletables import JOB_PAUSE, JOB_RUN
from hvctl.model.job import JobPause, JobRun, RunState

_EVERYTHING = ""
_QUICK = 120.0
"""Seconds from run to run of a job whose uneventful runs are folded."""
_PAUSE = text("INSERT INTO job_pause (host, job, since, who) VALUES (:host, :job, :since, :who) ON CONFLICT DO NOTHING")


class JobRuns:
    """The part of a Store that holds the daemon's jobs; errors as there."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, host: str, run: JobRun) -> None:
        """Of quick runs that were done and say the same again and again only the first and the last stay: a third one
        takes the place of the second. What changes, fails or finds somebody else at it has a row of its own."""
        row = {
            "host": host,
            "job": run.job,
            "started_at": run.started_at,
            "seconds": run.seconds,
            "state": run.state.value,
            "detail": run.detail,
            "who": run.by,
        }
        mine = (JOB_RUN.c.host == host, JOB_RUN.c.job == run.job)
        before = select(JOB_RUN).where(*mine).order_by(JOB_RUN.c.id.desc()).limit(2)
        with self._database.transaction(write=True) as connection:
            last = [_run(row) for row in connection.execute(before)]
            if run.state is RunState.DONE and len(last) == 2 and _again(last[0], run) and _again(*reversed(last)):
                connection.execute(delete(JOB_RUN).where(JOB_RUN.c.id == last[0].id))
            connection.execute(insert(JOB_RUN), row)

    def history(self, host: str, job: str | None = None, limit: int = 50) -> list[JobRun]:
        """Newest first."""
        query = select(JOB_RUN).where(JOB_RUN.c.host == host).order_by(JOB_RUN.c.id.desc()).limit(limit)
        if job is not None:
            query = query.where(JOB_RUN.c.job == job)
        with self._database.transaction(write=False) as connection:
            return [_run(row) for row in connection.execute(query)]

    def last(self, host: str) -> dict[str, JobRun]:
        """The newest run of each job."""
        newest = select(func.max(JOB_RUN.c.id)).where(JOB_RUN.c.host == host).group_by(JOB_RUN.c.job)
        with self._database.transaction(write=False) as connection:
            rows = connection.execute(select(JOB_RUN).where(JOB_RUN.c.id.in_(newest)))
            return {row.job: _run(row) for row in rows}

    def prune(self, host: str, until: float) -> int:
        with self._database.transaction(write=True) as connection:
            old = delete(JOB_RUN).where(JOB_RUN.c.host == host, JOB_RUN.c.started_at <= until)
            return connection.execute(old).rowcount

    def pause(self, host: str, job: str | None, who: str, since: float) -> None:
        """Stop one job, or (None) every automatic action; one that is paused already stays as it is."""
        row = {"host": host, "job": job or _EVERYTHING, "since": since, "who": who}
        with self._database.transaction(write=True) as connection:
            connection.execute(_PAUSE, row)

    def resume(self, host: str, job: str | None) -> bool:
        """Whether that pause was there."""
        gone = delete(JOB_PAUSE).where(JOB_PAUSE.c.host == host, JOB_PAUSE.c.job == (job or _EVERYTHING))
        with self._database.transaction(write=True) as connection:
            return connection.execute(gone).rowcount > 0

    def pauses(self, host: str) -> list[JobPause]:
        query = select(JOB_PAUSE).where(JOB_PAUSE.c.host == host).order_by(JOB_PAUSE.c.job)
        with self._database.transaction(write=False) as connection:
            return [JobPause(row.job or None, row.since, row.who) for row in connection.execute(query)]


def _again(before: JobRun, after: JobRun) -> bool:
    """Whether nothing happened between two runs but time."""
    same = (before.state, before.detail, before.by) == (after.state, after.detail, after.by)
    return same and 0 <= after.started_at - before.started_at <= _QUICK


def _run(row: Any) -> JobRun:
    return JobRun(row.job, row.started_at, row.seconds, RunState(row.state), row.detail, row.who, row.id)
