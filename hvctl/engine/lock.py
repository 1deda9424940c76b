"""One lock file per VM, held with flock, so the kernel frees it when its owner dies; its one line names the operation
and the phase it is in: what recovery reads to know how far a dead owner came.

A file that says nothing goes with its lock, while that is still held. Who waited for it then has the lock of a file
that is in no folder any more, and tries again with the one that is. Children must not inherit the descriptor (a forked
child would keep the lock), so it is close-on-exec and hvctl never uses the fork start method.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.kernel.process import boot_id, start_time
from hvctl.errors import BusyError, UnreachableError
from hvctl.model.operation import Phase

LINE = 256
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Mark:
    """What the lock file's line says: which operation, how far, by which process of which boot."""

    operation: int
    phase: Phase
    boot_id: str
    pid: int
    start_time: int | None


class VmLock:
    """The held lock of one VM."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._owner = {"boot_id": boot_id(), "pid": os.getpid(), "start_time": start_time(os.getpid())}

    def mark(self, operation: int, phase: Phase) -> None:
        """Write the line in place, at its full width: one pwrite, so a reader never sees half of it."""
        line = json.dumps({"operation": operation, "phase": phase.value, **self._owner})
        os.pwrite(self._fd, line.ljust(LINE - 1).encode() + b"\n", 0)

    def read(self) -> Mark | None:
        return _parse(os.pread(self._fd, LINE, 0))

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)


def _parse(line: bytes) -> Mark | None:
    try:
        raw = json.loads(line)
        return Mark(int(raw["operation"]), Phase(raw["phase"]), str(raw["boot_id"]), int(raw["pid"]), raw["start_time"])
    except (ValueError, KeyError, TypeError):
        return None


def why_not(folder: Path) -> str:
    """The hint where a lock cannot be made."""
    return "run hvctl as root" if os.geteuid() else f"see whether its file system became read-only: findmnt -T {folder}"


@contextmanager
def vm_lock(folder: Path, uuid: str, wait: float) -> Iterator[VmLock]:
    """The VM's lock, or BusyError after `wait` seconds. flock has no timed form, hence the short poll."""
    path = folder / f"{uuid}.lock"
    deadline = time.monotonic() + wait
    while (fd := _locked(path)) is None:
        if time.monotonic() >= deadline:
            raise BusyError(f"the VM is busy: {_owner(path)} has not ended in {wait:g} s.", "hvctl operation list")
        time.sleep(POLL_SECONDS)
    try:
        yield VmLock(fd)
    finally:
        if not os.fstat(fd).st_size and _is_at(fd, path):
            path.unlink()
        os.close(fd)


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None while somebody else has it."""
    while True:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise UnreachableError(f"the lock of the VM cannot be opened: {e}.", why_not(path.parent)) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if _is_at(fd, path):
            return fd
        os.close(fd)


def _owner(path: Path) -> str:
    try:
        mark = _parse(path.read_bytes()[:LINE])
    except FileNotFoundError:
        mark = None
    return f"operation {mark.operation} (pid {mark.pid})" if mark else "another operation"


def _is_at(fd: int, path: Path) -> bool:
    """Whether that is where the file is, and no other: a lock that nobody else would look for locks nothing."""
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def free(folder: Path, uuid: str) -> bool:
    """Whether nobody holds the VM's lock now."""
    try:
        with vm_lock(folder, uuid, 0):
            return True
    except BusyError:
        return False


def tidy(folder: Path, ended: Callable[[str, int], bool]) -> None:
    """Remove the files that nobody holds and that say nothing, or only of operations that have `ended`, of which it is
    asked with the VM's UUID and the number: what is left where an owner died at the very end. Others stay."""
    for path in sorted(folder.glob("*.lock")):
        with contextlib.suppress(BusyError, UnreachableError), vm_lock(folder, path.stem, 0) as lock:
            if (mark := lock.read()) and ended(path.stem, mark.operation):
                lock.clear()
