"""Two ways to see which pages of another process were written: userfaultfd with PAGEMAP_SCAN, and soft-dirty bits.
Both look from outside at a child process that maps its memory as QEMU maps a guest's RAM."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from hvctl.adapters.hostpaths import HostPaths
from hvctl.errors import DeadlineError, UnreachableError

PAGE = 4096
PAGES = 256
SECONDS = 5.0

# x86-64 numbers, from linux/userfaultfd.h and linux/fs.h of kernel 6.7.
_SYS_PIDFD_GETFD = 438
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFD_API = 0xAA
_WP_HUGETLBFS_SHMEM, _WP_UNPOPULATED, _WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_REGISTER_MODE_WP = 1 << 1
_WRITEPROTECT_MODE_WP = 1 << 0
_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING, _CHECK_WPASYNC = 1 << 0, 1 << 1
_PAGE_IS_WRITTEN = 1 << 1
_SOFT_DIRTY_BIT = 1 << 55

# The child maps memory as QEMU maps a guest's RAM (shared, half of it populated), opens a userfaultfd as it must be
# opened there, and then writes the pages it is told to. It ends when its stdin does.
_CHILD = f"""
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.memfd_create("hvctl-probe")
os.ftruncate(fd, {PAGE * PAGES})
ram = mmap.mmap(fd, {PAGE * PAGES})
for page in range(0, {PAGES}, 2):
    ram[page * {PAGE}] = 1
uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
error = ctypes.get_errno() if uffd < 0 else 0
address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
print(json.dumps(dict(address=address, uffd=uffd, errno=error)), flush=True)
for line in sys.stdin:
    for page in json.loads(line):
        ram[page * {PAGE} + 1] = (ram[page * {PAGE} + 1] + 1) % 256
    print("[]", flush=True)
"""


@dataclass(frozen=True)
class Child:
    """The process whose writes are to be seen; uffd is its own descriptor number, or minus an errno."""

    process: subprocess.Popen[bytes]
    address: int
    uffd: int
    until: float

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
        hello = json.loads(_line(process, until))
        yield Child(process, hello["address"], hello["uffd"] if hello["uffd"] >= 0 else -hello["errno"], until)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


class Tracker(Protocol):
    """One way to see written pages: what was written since arm() or the last collect(), which arms again."""

    def arm(self) -> None: ...

    def collect(self) -> tuple[int, ...]: ...

    def close(self) -> None: ...


class Userfault:
    """userfaultfd in asynchronous write-protect mode, collected and armed again by one PAGEMAP_SCAN."""

    def __init__(self, child: Child, paths: HostPaths) -> None:
        if child.uffd < 0:
            raise OSError(-child.uffd, os.strerror(-child.uffd), "userfaultfd")
        self._start, self._end = child.address, child.address + PAGE * PAGES
        self._open: list[int] = []
        pidfd = os.pidfd_open(child.process.pid)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            self._uffd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, child.uffd, 0)
            if self._uffd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "pidfd_getfd")
        finally:
            os.close(pidfd)
        self._open.append(self._uffd)
        self._pagemap = os.open(paths.proc / str(child.process.pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._open.append(self._pagemap)

    def arm(self) -> None:
        features = _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC
        self._call("UFFDIO_API", self._uffd, _UFFDIO_API, struct.pack("=3Q", _UFFD_API, features, 0))
        size = self._end - self._start
        register = struct.pack("=4Q", self._start, size, _REGISTER_MODE_WP, 0)
        self._call("UFFDIO_REGISTER", self._uffd, _UFFDIO_REGISTER, register)
        protect = struct.pack("=3Q", self._start, size, _WRITEPROTECT_MODE_WP)
        self._call("UFFDIO_WRITEPROTECT", self._uffd, _UFFDIO_WRITEPROTECT, protect)

    def collect(self) -> tuple[int, ...]:
        regions = (ctypes.c_uint64 * (3 * PAGES))()
        request = struct.pack(
            "=12Q", 96, _WP_MATCHING | _CHECK_WPASYNC, self._start, self._end, 0, ctypes.addressof(regions), PAGES,
            0, 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN,
        )  # fmt: skip
        found = self._call("PAGEMAP_SCAN", self._pagemap, _PAGEMAP_SCAN, request)
        spans = [(regions[3 * i], regions[3 * i + 1]) for i in range(found)]
        return tuple((a - self._start) // PAGE for start, end in spans for a in range(start, end, PAGE))

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    @staticmethod
    def _call(name: str, fd: int, request: int, argument: bytes) -> int:
        try:
            answer: int = fcntl.ioctl(fd, request, bytearray(argument), True)
        except OSError as e:
            raise OSError(e.errno, e.strerror, name) from e
        return answer


class SoftDirty:
    """The soft-dirty bit of the page tables, cleared by writing 4 to clear_refs."""

    def __init__(self, child: Child, paths: HostPaths) -> None:
        self._folder = paths.proc / str(child.process.pid)
        self._start = child.address

    def arm(self) -> None:
        (self._folder / "clear_refs").write_text("4")

    def collect(self) -> tuple[int, ...]:
        with (self._folder / "pagemap").open("rb", buffering=0) as stream:
            stream.seek(self._start // PAGE * 8)
            entries = struct.unpack(f"={PAGES}Q", stream.read(8 * PAGES))
        self.arm()
        return tuple(i for i, entry in enumerate(entries) if entry & _SOFT_DIRTY_BIT)

    def close(self) -> None:
        pass
