"""What the jobs of this node do and did, and their pauses: also while libvirt does not answer, which is when one wants
to pause them."""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvctl.adapters.store.store import Store
from hvctl.engine.nodelock import last_host
from hvctl.engine.runtime import open_host
from hvctl.errors import UnreachableError
from hvctl.model.job import JobPause, JobRun
from hvctl.settings import Settings


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Store, str]]:
    with Store(settings.database) as store:
        store.migrate()
        yield store, host_name(settings)


def host_name(settings: Settings) -> str:
    """The host as libvirt names it, or, when libvirt does not answer, as the last daemon here noted it."""
    try:
        host = open_host(settings)
    except UnreachableError:
        if known := last_host(Path(settings.run_dir)):
            return known
        raise
    try:
        return host.domains.facts().name
    finally:
        host.meter.close()
        host.domains.close()


def state(settings: Settings) -> tuple[dict[str, JobRun], list[JobPause]]:
    """The last run of each job, and what is paused."""
    with _opened(settings) as (store, host):
        return store.jobs.last(host), store.jobs.pauses(host)


def history(settings: Settings, job: str | None, limit: int) -> list[JobRun]:
    """Newest first."""
    with _opened(settings) as (store, host):
        return store.jobs.history(host, job, limit)


def pause(settings: Settings, job: str | None) -> None:
    """One job, or every automatic action of this host, until it is resumed."""
    with _opened(settings) as (store, host):
        store.jobs.pause(host, job, os.environ.get("SUDO_USER") or getpass.getuser(), time.time())


def resume(settings: Settings, job: str | None) -> bool:
    """Whether that pause was there."""
    with _opened(settings) as (store, host):
        return store.jobs.resume(host, job)
