"""userfaultfd in asynchronous write-protect mode, collected and armed again by one PAGEMAP_SCAN. Kernel 6.7 or newer.

The descriptor belongs to the traced process and stays there; this process works with a copy of it. Numbers from
linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from hvctl.adapters.kernel import process
from hvctl.adapters.ram.trackers.injection import system_call
from hvctl.adapters.ram.trackers.mappings import PROC, MappedSpans, Span
from hvctl.adapters.ram.trackers.pagemap import Pagemap, Ranges, merged
from hvctl.errors import RefusedError

COMPARE: Final = "hvctl reset --tracker compare"

# System calls of x86-64.
_CLOSE, _USERFAULTFD, _PIDFD_GETFD = 3, 323, 438
# Without UFFD_USER_MODE_ONLY an unprivileged process such as QEMU gets EPERM. It only forbids to hand the kernel's own
# faults to user mode, and asynchronous mode hands over none: writes by system calls are seen all the same.
_USER_MODE_ONLY: Final = 1
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY

_UFFD_API: Final = 0xAA
_WP_HUGETLBFS_SHMEM, _WP_UNPOPULATED, _WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_FEATURES: Final = _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC
_INITIALIZED: Final = 1 << 31  # as /proc/PID/fdinfo shows it
_API: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_UNREGISTER: Final = 0x8010AA01
_WRITEPROTECT: Final = 0xC018AA06
_MODE_WP: Final = 1 << 1
_PROTECT: Final = 1 << 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A userfaultfd of a process: its number there, and what tells it from another one with that number."""

    number: int
    inode: int
    features: int

    @property
    def ours(self) -> bool:
        """QEMU's own (postcopy, background snapshots) are never asynchronous. One without features was left by an hvctl
        that died before it could say what it wanted."""
        return self.features in (0, _FEATURES | _INITIALIZED)


class Userfault:
    """A tracker of the spans; `descriptor` is one that is in the process already."""

    kind = "uffd"

    def __init__(self, pid: int, spans: tuple[Span, ...], descriptor: Descriptor) -> None:
        """OSError: the process or the descriptor is gone, or not ours to look at."""
        self._pid, self._spans, self._descriptor = pid, spans, descriptor
        self._started = process.start_time(pid)
        self._uffd = _copy(pid, descriptor.number)
        try:
            self._pagemap = Pagemap(pid)
            try:
                self._mapped = MappedSpans(pid, spans)
            except BaseException:
                self._pagemap.close()
                raise
        except BaseException:
            os.close(self._uffd)
            raise

    def register(self) -> None:
        """OSError: EINVAL if the kernel is too old, EBUSY if the process itself has a userfaultfd there."""
        if not self._descriptor.features & _INITIALIZED:
            _ioctl(self._uffd, _API, struct.pack("=3Q", _UFFD_API, _FEATURES, 0))
        for span in self._spans:
            _ioctl(self._uffd, _REGISTER, struct.pack("=4Q", span.address, span.length, _MODE_WP, 0))
            # Unlike the scan this also splits huge pages, of which one write would else be 512. What is not populated
            # is left alone: page tables made only for this would have to be looked through by every scan.
            for start, end in merged(list(self._pagemap.populated(span.address, span.address + span.length))).tolist():
                _ioctl(self._uffd, _WRITEPROTECT, struct.pack("=3Q", start, end - start, _PROTECT))

    def unregister(self) -> None:
        for span in self._spans:
            with suppress(OSError):  # A mapping that is gone has nothing to unregister.
                _ioctl(self._uffd, _UNREGISTER, struct.pack("=2Q", span.address, span.length))

    def check(self) -> None:
        """RefusedError: it does not track all the spans. Changes nothing."""
        try:
            for span in self._spans:
                self._pagemap.check_tracked(span.address)
        except OSError as e:
            raise self._lost(e) from e
        if not self._mapped.whole():
            raise self._lost()

    def arm(self, where: Ranges | None = None) -> None:
        try:
            for start, end, _ in self._places(where):
                self._pagemap.protect(start, end)
        except OSError as e:
            raise self._lost(e) from e
        if not self._mapped.whole():
            raise self._lost()

    def peek(self, where: Ranges | None = None) -> Ranges:
        return self._ranges(self._pagemap.written, where)

    def collect(self, where: Ranges | None = None) -> Ranges:
        return self._ranges(self._pagemap.take_written, where)

    def _ranges(self, ask: Callable[[int, int], Iterator[Ranges]], where: Ranges | None) -> Ranges:
        found = []
        try:
            for start, end, shift in self._places(where):
                found += [r + shift for r in ask(start, end)]
        except OSError as e:
            raise self._lost(e) from e
        if not self._mapped.whole():
            raise self._lost()
        return merged(found)

    def _places(self, where: Ranges | None) -> Iterator[tuple[int, int, int]]:
        """Addresses [start, end) of these ranges of the file, and what makes an offset of an address."""
        for span in self._spans:
            shift = span.offset - span.address
            ranges = [[span.offset, span.offset + span.length]] if where is None else where.tolist()
            for start, end in ranges:
                first, last = max(start, span.offset), min(end, span.offset + span.length)
                if first < last:
                    yield first - shift, last - shift, shift

    def token(self) -> str:
        return f"{self._descriptor.number}:{self._descriptor.inode}:{self._started}"

    def close(self) -> None:
        for fd in (self._mapped, self._pagemap):
            fd.close()
        os.close(self._uffd)

    def _lost(self, error: OSError | None = None) -> RefusedError:
        reason = error.strerror if error else "a part of it is not mapped any more"
        return RefusedError(f"the tracker lost its hold on the RAM of process {self._pid}: {reason}.", COMPARE)


def open_userfault(pid: int, spans: tuple[Span, ...]) -> Userfault:
    """A tracker with a descriptor made in the process, or with the one that an earlier hvctl left there.

    RefusedError: the kernel cannot, the process may not be traced, or uses userfaultfd itself. UnreachableError: it is
    gone. DeadlineError: it is stopped.
    """
    _check_kernel()
    found = [d for d in descriptors(pid) if d.ours]
    for extra in found[1:]:
        _close(pid, extra)
    number = found[0].number if found else _make(pid)
    descriptor = _find(pid, number)
    try:
        if descriptor is None:
            raise RefusedError(f"process {pid} has no userfaultfd {number}, which was just made.", COMPARE)
        tracker = Userfault(pid, spans, descriptor)
    except OSError as e:
        raise RefusedError(f"the userfaultfd of process {pid} cannot be used: {e.strerror}.", COMPARE) from e
    try:
        tracker.register()
    except OSError as e:
        tracker.close()
        _close(pid, descriptor)
        reason = "QEMU uses userfaultfd itself (a migration?)" if e.errno == errno.EBUSY else e.strerror
        raise RefusedError(f"the RAM of process {pid} cannot be tracked: {reason}.", COMPARE) from e
    return tracker


def resume_userfault(pid: int, spans: tuple[Span, ...], token: str) -> Userfault:
    """RefusedError: the descriptor that the token names is gone, or does not track all of the spans any more."""
    descriptor = _named(pid, token)
    if descriptor is None:
        raise RefusedError(f"process {pid} has not the userfaultfd of an earlier hvctl any more.", COMPARE)
    try:
        tracker = Userfault(pid, spans, descriptor)
    except OSError as e:
        raise RefusedError(f"the userfaultfd of process {pid} cannot be used: {e.strerror}.", COMPARE) from e
    try:
        tracker.check()
    except BaseException:
        tracker.close()
        raise
    return tracker


def end_userfault(pid: int, spans: tuple[Span, ...], token: str) -> None:
    """Nothing is left of it in the process; nothing to do if it or the process is gone. Errors as of open_userfault."""
    descriptor = _named(pid, token)
    if descriptor is None:
        return
    with suppress(OSError):
        tracker = Userfault(pid, spans, descriptor)
        # Done from here, so that QEMU's thread has less to do in its close().
        tracker.unregister()
        tracker.close()
    _close(pid, descriptor)


def descriptors(pid: int) -> Iterator[Descriptor]:
    """All userfaultfds of a process, lowest number first; none if it is gone."""
    try:
        numbers = sorted(int(p.name) for p in (PROC / str(pid) / "fd").iterdir())
    except OSError:
        return
    for number in numbers:
        found = _find(pid, number)
        if found is not None:
            yield found


def _find(pid: int, number: int) -> Descriptor | None:
    folder = PROC / str(pid)
    try:
        if str((folder / "fd" / str(number)).readlink()) != "anon_inode:[userfaultfd]":
            return None
        text = (folder / "fdinfo" / str(number)).read_text()
    except OSError:
        return None
    inode = re.search(r"^ino:\s*(\d+)$", text, re.MULTILINE)
    api = re.search(r"^API:\s*[0-9a-f]+:([0-9a-f]+):", text, re.MULTILINE)
    return Descriptor(number, int(inode[1]) if inode else 0, int(api[1], 16)) if api else None


def _named(pid: int, token: str) -> Descriptor | None:
    match = re.fullmatch(r"(\d+):(\d+):(\d+)", token)
    if match is None:
        return None
    number, inode, started = map(int, match.groups())
    if process.start_time(pid) != started:
        return None
    found = _find(pid, number)
    return found if found is not None and found.inode == inode and found.ours else None


def _check_kernel() -> None:
    """What the kernel would refuse later is refused before QEMU is touched."""
    fd = _libc.syscall(_USERFAULTFD, _FLAGS)
    try:
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _ioctl(fd, _API, struct.pack("=3Q", _UFFD_API, _FEATURES, 0))
    except OSError as e:
        reason = f"this kernel has no asynchronous write protection ({e.strerror})"
        raise RefusedError(f"{reason}: it takes 6.7 or newer.", COMPARE) from e
    finally:
        if fd >= 0:
            os.close(fd)


def _make(pid: int) -> int:
    try:
        return system_call(pid, _USERFAULTFD, _FLAGS)
    except OSError as e:
        raise RefusedError(f"process {pid} cannot make a userfaultfd: {e.strerror}.", COMPARE) from e


def _close(pid: int, descriptor: Descriptor) -> None:
    """The descriptor goes from the process, which is looked at again right before."""
    if _find(pid, descriptor.number) is None:
        return
    with suppress(OSError):
        system_call(pid, _CLOSE, descriptor.number)
    if _find(pid, descriptor.number) is not None:
        raise RefusedError(f"process {pid} still has its userfaultfd {descriptor.number}.", "try again")


def _copy(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(pidfd)


def _ioctl(fd: int, request: int, argument: bytes) -> None:
    fcntl.ioctl(fd, request, bytearray(argument), True)


_libc = ctypes.CDLL(None, use_errno=True)
