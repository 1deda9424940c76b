"""The trackers of adapters.ram.trackers, tried on a process whose writes are known: a child that maps its memory as
QEMU maps the RAM of a guest, and writes the pages that it is told to."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.node.hostpaths import HostPaths
from hvctl.adapters.ram.trackers import Span, end_tracker, open_tracker, softdirty
from hvctl.adapters.ram.trackers.pagemap import PAGE
from hvctl.errors import DeadlineError, UnreachableError

PAGES = 256
SECONDS = 5.0

# All of its memory is there from the start: of pages that are not, soft-dirty bits tell nothing. It ends when its stdin
# does.
_CHILD = f"""
import ctypes, json, mmap, os, sys
fd = os.memfd_create("hvctl-probe")
os.ftruncate(fd, {PAGE * PAGES})
ram = mmap.mmap(fd, {PAGE * PAGES})
for page in range({PAGES}):
    ram[page * {PAGE}] = 1
print(json.dumps(ctypes.addressof(ctypes.c_char.from_buffer(ram))), flush=True)
for line in sys.stdin:
    for page in json.loads(line):
        ram[page * {PAGE} + 1] = (ram[page * {PAGE} + 1] + 1) % 256
    print("[]", flush=True)
"""


@dataclass(frozen=True)
class Child:
    """The process whose writes are to be seen."""

    process: subprocess.Popen[bytes]
    address: int
    until: float

    @property
    def spans(self) -> tuple[Span, ...]:
        return (Span(self.address, 0, PAGE * PAGES),)

    def write(self, pages: tuple[int, ...]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(pages).encode() + b"\n")
        self.process.stdin.flush()
        _line(self.process, self.until)


def _line(process: subprocess.Popen[bytes], until: float) -> bytes:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        raise DeadlineError("the probe's child process did not answer.")
    line: bytes = process.stdout.readline()
    if not line:
        raise UnreachableError("the probe's child process ended early.")
    return line


@contextmanager
def child() -> Iterator[Child]:
    until = time.monotonic() + SECONDS
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
    )  # fmt: skip
    try:
        yield Child(process, json.loads(_line(process, until)), until)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


class Tracker(Protocol):
    """One way to see written pages: what was written since arm() or the last collect(), which arms again."""

    def arm(self) -> None: ...

    def collect(self) -> tuple[int, ...]: ...

    def close(self) -> None: ...


class Userfault:
    """userfaultfd, by a system call made inside the child, as inside QEMU."""

    def __init__(self, child: Child, _paths: HostPaths) -> None:
        self._child = child
        self._tracker = open_tracker("uffd", child.process.pid, child.spans)

    def arm(self) -> None:
        self._tracker.arm()

    def collect(self) -> tuple[int, ...]:
        return _pages(self._tracker.collect())

    def close(self) -> None:
        token = self._tracker.token()
        self._tracker.close()
        end_tracker("uffd", self._child.process.pid, self._child.spans, token)


class SoftDirty:
    """Soft-dirty bits."""

    def __init__(self, child: Child, paths: HostPaths) -> None:
        self._tracker = softdirty.SoftDirty(child.process.pid, child.spans, paths.proc)

    def arm(self) -> None:
        self._tracker.arm()

    def collect(self) -> tuple[int, ...]:
        return _pages(self._tracker.collect())

    def close(self) -> None:
        self._tracker.close()


def _pages(ranges: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(page for start, end in (ranges // PAGE).tolist() for page in range(start, end))
