"""One node daemon per host: a lock file that is held with flock, never unlinked, and names its holder.

The kernel frees it when the holder dies, however it dies. It also says which host the holder works on, so that the
daemon's jobs can be paused while libvirt does not answer.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvctl.engine.lock import why_not
from hvctl.errors import BusyError, UnreachableError

FILE = "node.lock"
_LINE = 512


@contextmanager
def node_lock(folder: Path) -> Iterator[NodeLock]:
    """The host's lock; BusyError with the pid of who has it."""
    with held(folder / FILE, "the node daemon runs already", "hvctl job list shows what it does") as fd:
        yield NodeLock(fd)


@contextmanager
def job_lock(folder: Path, job: str) -> Iterator[None]:
    """At most one run of a job at a time, whoever runs it; BusyError with the pid of who does."""
    with held(folder / "jobs" / f"{job}.lock", f"the job {job} runs already", "hvctl job history shows when it ends"):
        yield


class NodeLock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def name_host(self, host: str) -> None:
        _write(self._fd, host)


@contextmanager
def held(path: Path, what: str, hint: str) -> Iterator[int]:
    """The descriptor of a locked file, close-on-exec: a child must not keep the lock."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise UnreachableError(f"the lock {path} cannot be opened: {e.strerror}.", why_not(path.parent)) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse(os.pread(fd, _LINE, 0)).get("pid")
            raise BusyError(f"{what} (pid {holder}).", hint) from None
        _write(fd, "")
        yield fd
    finally:
        os.close(fd)


def last_host(folder: Path) -> str | None:
    """The host that the last daemon here worked on."""
    try:
        line = (folder / FILE).read_bytes()[:_LINE]
    except OSError:
        return None
    return _parse(line).get("host") or None


def _write(fd: int, host: str) -> None:
    """At its full width in one go, so that a reader never sees half of it."""
    line = json.dumps({"pid": os.getpid(), "host": host})
    os.pwrite(fd, line.ljust(_LINE - 1).encode() + b"\n", 0)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
