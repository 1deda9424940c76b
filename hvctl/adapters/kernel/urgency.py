"""Puts the thread that holds a guest paused, and the guest's QEMU, before all others of the host: where that is busy, a
pause of some milliseconds of work would be mostly waiting for a processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# What it starts meanwhile is not urgent, whatever it is; and the flag tells ours from what an operator asks of libvirt
# (<emulatorsched>), which never sets it.
_POLICY: Final = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_LOWEST: Final = os.sched_param(1)
_VCPU: Final = "CPU "  # how QEMU names the threads of vCPUs: these stand still


@contextmanager
def urgent(thread: int = 0) -> Iterator[None]:
    """Of this thread, or of another one of this process, by its native identifier; where that is not allowed, it waits
    for its turn as before."""
    try:
        policy, parameters = os.sched_getscheduler(thread), os.sched_getparam(thread)
        os.sched_setscheduler(thread, _POLICY, _LOWEST)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(thread, policy, parameters)


@contextmanager
def urgent_process(pid: int) -> Iterator[None]:
    """All threads of a QEMU process but those of vCPUs and those that an operator gave a policy; where that is not
    allowed they wait for their turn as before.

    A kernel with RT_GROUP_SCHED allows it only in a cgroup that has a share of real time, and libvirt's have none. None
    is given to them: what runs there is counted from one pause to the next, and stops for up to a second when the share
    is used up, amid a pause.
    """
    first: list[int] = []  # by this call: one around it has others
    try:
        with suppress(OSError):
            _put_first(pid, first)
        yield
    finally:
        _calm(first)


def calm(pid: int) -> None:
    """What a killed hvctl may have left urgent waits for its turn again."""
    _calm(_threads(pid))


def _calm(threads: list[int]) -> None:
    for thread in threads:
        with suppress(OSError):
            if os.sched_getscheduler(thread) == _POLICY:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _put_first(pid: int, first: list[int]) -> None:
    for thread in _threads(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # It ended just now.
            name = Path(f"/proc/{pid}/task/{thread}/comm").read_text()
            if not name.startswith(_VCPU) and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, _POLICY, _LOWEST)
                first.append(thread)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - the names are all that is needed
    except OSError:
        return []
