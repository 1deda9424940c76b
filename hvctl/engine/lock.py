"""One lock file per VM, held with flock and never unlinked, so the kernel frees it when its owner dies.

Its one line names the operation and the phase it is in: what recovery reads to know how far a dead owner came.
Children must not inherit the descriptor (a forked child would keep the lock), so it is close-on-exec and hvctl never
uses the fork start method.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
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
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / f"{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise UnreachableError(f"the lock of the VM cannot be opened: {e}.", why_not(folder)) from e
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = _parse(os.pread(fd, LINE, 0))
                    who = f"operation {owner.operation} (pid {owner.pid})" if owner else "another operation"
                    raise BusyError(
                        f"the VM is busy: {who} has not ended in {wait:g} s.", "hvctl operation list"
                    ) from None
                time.sleep(POLL_SECONDS)
        yield VmLock(fd)
    finally:
        os.close(fd)


def free(folder: Path, uuid: str) -> bool:
    """Whether nobody holds the VM's lock now."""
    try:
        with vm_lock(folder, uuid, 0):
            return True
    except BusyError:
        return False
