"""Counters of the processor while it runs a VM's vCPUs, by perf_event_open; absent where the machine has none.

Spoken directly: the system call has no wrapper in libc, and its structure is fixed ABI (linux/perf_event.h).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import Final

from hvctl.model.meter import Hardware
from hvctl.model.vm import Process

_SYSCALL: Final = {"x86_64": 298, "aarch64": 241}
_HARDWARE: Final = 0
# Cycles, instructions, cache misses: PERF_COUNT_HW_CPU_CYCLES, _INSTRUCTIONS, _CACHE_MISSES.
EVENTS: Final = ((_HARDWARE, 0), (_HARDWARE, 1), (_HARDWARE, 3))
_GROUP_FORMAT: Final = 0x8  # PERF_FORMAT_GROUP: one read gives all of a thread's counters
_SIZE: Final = 112  # PERF_ATTR_SIZE_VER5
_ATTRIBUTE: Final = Struct("=IIQQQQQ")
_EXCLUDE_NOTHING: Final = 0
_CLOSE_ON_EXEC: Final = 0x8
_ANY_CPU: Final = -1

Event = tuple[int, int]


class PerfCounters:
    """Open counters of each VM's vCPU threads. fault says why there are none, None if there are."""

    def __init__(self, events: tuple[Event, ...] = EVENTS) -> None:
        self._events = events
        self._open: dict[str, tuple[Process, dict[int, list[int]]]] = {}
        self.fault = self._probe()

    def read(self, uuid: str, process: Process) -> Hardware | None:
        """The sum over the vCPUs since the first read of this process; None where it cannot be counted."""
        if self.fault is not None:
            return None
        known = self._open.get(uuid)
        if known is None or known[0] != process:
            self._drop(uuid)
            known = self._open[uuid] = (process, {})
        threads = known[1]
        now = set(vcpu_threads(process.pid))
        for thread in now - threads.keys():
            try:
                threads[thread] = self._group(thread)
            except OSError:
                return None
        sums = [0] * len(self._events)
        for group in threads.values():
            # A vCPU that was unplugged keeps what it counted: its thread has ended, its counter has not.
            for i, count in enumerate(_counts(group[0], len(self._events))):
                sums[i] += count
        return Hardware(*sums) if threads else None

    def keep(self, uuids: set[str]) -> None:
        for uuid in self._open.keys() - uuids:
            self._drop(uuid)

    def close(self) -> None:
        for uuid in list(self._open):
            self._drop(uuid)

    def _drop(self, uuid: str) -> None:
        for group in self._open.pop(uuid, (None, {}))[1].values():
            _close(group)

    def _probe(self) -> str | None:
        try:
            _close(self._group(0))
        except OSError as e:
            return f"perf_event_open: {e.strerror}"
        return None

    def _group(self, thread: int) -> list[int]:
        opened: list[int] = []
        try:
            for kind, event in self._events:
                opened.append(_perf_event_open(kind, event, thread, opened[0] if opened else -1))
        except OSError:
            _close(opened)
            raise
        return opened


def vcpu_threads(pid: int) -> list[int]:
    """QEMU names them `CPU 0/KVM`, `CPU 1/TCG`."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            name = (task / "comm").read_text()
        except OSError:
            continue
        if name.startswith("CPU ") and "/" in name:
            found.append(int(task.name))
    return found


def _perf_event_open(kind: int, event: int, thread: int, group: int) -> int:
    number = _SYSCALL.get(os.uname().machine)
    if number is None:
        raise OSError(38, "this processor's system call is not known")
    attribute = _ATTRIBUTE.pack(kind, _SIZE, event, 0, 0, _GROUP_FORMAT, _EXCLUDE_NOTHING).ljust(_SIZE, b"\0")
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    fd = call(number, ctypes.c_char_p(attribute), thread, _ANY_CPU, group, ctypes.c_ulong(_CLOSE_ON_EXEC))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)


def _counts(leader: int, count: int) -> Iterable[int]:
    data = os.read(leader, 8 * (count + 1))
    return Struct(f"={count + 1}Q").unpack(data)[1:]


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
