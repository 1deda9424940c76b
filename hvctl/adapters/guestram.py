"""Guest RAM as the file that QEMU maps, and its sparse copy: copy it, find what differs, write that back.

This is the compare tracker: it reads all resident RAM, needs nothing from the kernel, and is the oracle that faster
trackers are checked against. The guest must be paused throughout; nothing here can see that.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import CDLL, c_int, c_int64, get_errno
from dataclasses import dataclass, replace
from errno import ENOSPC, ENXIO
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from hvctl.errors import HvctlError, NotFoundError, RefusedError

PAGE: Final = 4096
# One piece of both files fits the second-level cache, so the compare runs at the speed of the reads.
PIECE: Final = 256 << 10
THREADS: Final = 2
_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of guest RAM, whole pages. zero: all of them should be zero."""

    offset: int
    length: int
    zero: bool = False


# --- opening


@contextmanager
def guest_ram(path: str, pid: int) -> Iterator[int]:
    """A descriptor of the RAM file of a QEMU process. RefusedError: it is not the file that the process maps shared
    and whole, or its pages are huge."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        raise RefusedError(f"the RAM file {path} cannot be opened: {e.strerror}.", "hvctl doctor") from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size or status.st_size % PAGE:
            raise RefusedError(f"{path} is not a RAM file.")
        if os.fstatvfs(fd).f_bsize != PAGE:
            raise RefusedError(f"{path} has huge pages: hvctl cannot snapshot them.", "remove <hugepages/> from the VM")
        if _mapped(pid, status) != status.st_size:
            raise RefusedError(
                f"process {pid} does not map {path} shared and whole: it is not this VM's RAM.", "hvctl doctor"
            )
        yield fd
    finally:
        os.close(fd)


def _mapped(pid: int, file: os.stat_result) -> int:
    """Bytes of the file, from its start and without a gap, that the process maps shared."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return 0
    end = 0
    # QEMU may have split the mapping (madvise), so the parts are put together again.
    parts = []
    for line in maps.splitlines():
        span, rights, offset, dev, inode = line.split(maxsplit=5)[:5]
        if dev == device and int(inode) == file.st_ino and rights[3] == "s":
            low, high = (int(x, 16) for x in span.split("-"))
            parts.append((int(offset, 16), high - low))
    for start, length in sorted(parts):
        if start > end:
            break
        end = max(end, start + length)
    return end


@contextmanager
def stored_ram(path: Path, size: int, *, create: bool = False) -> Iterator[int]:
    """A descriptor of a snapshot's copy, `size` bytes long; `create` makes it anew and empty, 0600."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if create else os.O_RDONLY
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as e:
        raise NotFoundError(f"the RAM of the snapshot, {path}, is not there.", "hvctl snapshot list") from e
    except OSError as e:
        raise RefusedError(f"{path} cannot be opened: {e.strerror}.", "hvctl doctor") from e
    try:
        if create:
            os.ftruncate(fd, size)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise RefusedError(f"{path} is not a copy of {size} bytes of RAM: the snapshot is damaged.", "delete it")
        yield fd
    finally:
        os.close(fd)


# --- the three operations


def copy(guest: int, stored: int) -> int:
    """Fill the empty copy from the guest; bytes stored. Holes stay holes."""
    size = _same_size(guest, stored)
    runs = [
        Run(at, min(PIECE, e.offset + e.length - at))
        for e in _data(guest, size)
        for at in range(e.offset, e.offset + e.length, PIECE)
    ]

    def share(mine: list[Run]) -> int:
        buffer = memoryview(bytearray(PIECE))
        for run in mine:
            _write(stored, _read(guest, run.offset, buffer[: run.length]), run.offset)
        return sum(run.length for run in mine)

    return _in_threads(runs, share)


def restore(guest: int, stored: int) -> int:
    """Make guest RAM equal to the copy; bytes that differed, in whole pages."""

    def mend(at: Run, wanted: memoryview) -> None:
        if at.zero:
            _clear(guest, at)
        else:
            _write(guest, wanted, at.offset)

    return _compare(guest, stored, mend)


def difference(guest: int, stored: int) -> int:
    """Pages of guest RAM that are not as in the copy."""
    return _compare(guest, stored, lambda _at, _wanted: None) // PAGE


def resident(path: str) -> int:
    """Bytes of the RAM file that exist: what a copy will take."""
    try:
        return Path(path).lstat().st_blocks * 512
    except OSError as e:
        raise RefusedError(f"the RAM file {path} cannot be read: {e.strerror}.", "hvctl doctor") from e


# --- how


def _compare(guest: int, stored: int, differs: Callable[[Run, memoryview], None]) -> int:
    """Call `differs` with each run of pages that is not as stored, and the bytes it should hold."""
    size = _same_size(guest, stored)
    # Where both have a hole both are zero. A hole in one of them reads as zeros, without making a page of it.
    touched = {
        at
        for e in (*_data(guest, size), *_data(stored, size))
        for at in range(e.offset // PIECE, -(-(e.offset + e.length) // PIECE))
    }

    def share(pieces: list[int]) -> int:
        now, wanted, differing = bytearray(PIECE), bytearray(PIECE), 0
        for offset in (piece * PIECE for piece in pieces):
            length = min(PIECE, size - offset)
            if length < PIECE:  # Only the last one can be.
                now, wanted = bytearray(length), bytearray(length)
            _read(guest, offset, memoryview(now))
            _read(stored, offset, memoryview(wanted))
            if now == wanted:
                continue
            for run in _unequal_pages(now, wanted):
                right = memoryview(wanted)[run.offset : run.offset + run.length]
                differs(replace(run, offset=offset + run.offset), right)
                differing += run.length
        return differing

    return _in_threads(sorted(touched), share)


def _unequal_pages(a: bytearray, b: bytearray) -> list[Run]:
    words = PAGE // 8
    unequal = (np.frombuffer(a, np.uint64) != np.frombuffer(b, np.uint64)).reshape(-1, words).any(axis=1)
    zero = ~np.frombuffer(b, np.uint64).reshape(-1, words).any(axis=1)
    # 0 equal, 1 write, 2 clear: a run never mixes the last two, so that zero pages become holes again.
    kind = unequal.astype(np.int8) * (1 + zero.astype(np.int8))
    edges = np.flatnonzero(np.diff(kind)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), len(kind)]
    return [Run(s * PAGE, (e - s) * PAGE, bool(kind[s] == 2)) for s, e in zip(starts, ends, strict=True) if kind[s]]


def _data(fd: int, size: int) -> Iterator[Run]:
    """The extents of a file that are not holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        low, high = start // PAGE * PAGE, min(-(-end // PAGE) * PAGE, size)
        yield Run(low, high - low)


def _in_threads(work: list[_T], share: Callable[[list[_T]], int]) -> int:
    """Reading and numpy release the interpreter lock. No two items of the work overlap, so no thread sees what another
    one writes."""
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(share, (work[n::THREADS] for n in range(THREADS))))


def _same_size(guest: int, stored: int) -> int:
    size, other = os.fstat(guest).st_size, os.fstat(stored).st_size
    if size != other:
        raise RefusedError(f"guest RAM has {size} bytes and the snapshot's {other}.", "take a new snapshot")
    return size


# Reads and writes go through the file and not through a mapping: a mapping would make pages of the holes that it
# reads, and would kill this process if somebody truncated the file.


def _read(fd: int, offset: int, into: memoryview) -> memoryview:
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as e:
            raise HvctlError(f"RAM cannot be read at {offset + done}: {e.strerror}.") from e
        if not got:
            raise HvctlError(f"RAM ends at {offset + done}: the file was cut while it was read.")
        done += got
    return into


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            put = os.pwrite(fd, data[done:], offset + done)
        except OSError as e:
            raise _no_space(e) if e.errno == ENOSPC else HvctlError(f"RAM cannot be written: {e.strerror}.") from e
        if not put:
            raise HvctlError("RAM cannot be written: the kernel took nothing.")
        done += put


def _clear(fd: int, at: Run) -> None:
    """Give the pages back to the host, as QEMU itself does for the balloon: every mapping of the file (KVM's too) is
    told, and the guest finds zeros. What pins pages (VFIO) would not be, but it also forbids QEMU to save state."""
    if _libc.fallocate(fd, _PUNCH_HOLE, at.offset, at.length):
        raise HvctlError(f"pages of RAM cannot be given back: {os.strerror(get_errno())}.")


def _no_space(error: OSError) -> HvctlError:
    wrapped = RefusedError("no space for guest RAM: the tmpfs or the host's memory is full.", "hvctl snapshot list")
    wrapped.__cause__ = error
    return wrapped


def wipe(path: Path) -> None:
    """Remove a file with guest secrets; absent already is fine.

    Its pages are cleared by being freed: on tmpfs they are only memory, and the kernel zeroes a page before anybody
    else gets it, so overwriting first would add time and nothing else. Truncating before the unlink frees them even
    while somebody still has the file open.
    """
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
    path.unlink(missing_ok=True)
