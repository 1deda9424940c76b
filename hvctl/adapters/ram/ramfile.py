"""The file of one region of guest RAM: opened only if it is what the QEMU process maps, read, written and cleared."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from ctypes import CDLL, c_int, c_int64, get_errno
from errno import ENOSPC, ENXIO
from pathlib import Path
from typing import Final

from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.ram.trackers import Span, spans
from hvctl.errors import HvctlError, RefusedError

_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)


def open_mapped(path: str, size: int, pid: int) -> tuple[int, tuple[Span, ...]]:
    """A descriptor of the RAM file of a QEMU process, and where the process maps it. RefusedError: it is not the file
    that the process maps shared and whole, has another size, or its pages are huge."""
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
        if status.st_size != size:
            raise RefusedError(f"{path} has {status.st_size} bytes of RAM and not {size}.", "take a new snapshot")
        mapped = spans(pid, status)
        if _whole(mapped) != status.st_size:
            raise RefusedError(
                f"process {pid} does not map {path} shared and whole: it is not this VM's RAM.", "hvctl doctor"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, mapped


def _whole(mapped: tuple[Span, ...]) -> int:
    """Bytes from the file's start without a gap."""
    end = 0
    for span in mapped:
        if span.offset > end:
            break
        end = max(end, span.offset + span.length)
    return end


def resident(path: str) -> int:
    """Bytes of the RAM file that exist: what a copy of all of it takes."""
    try:
        return Path(path).lstat().st_blocks * 512
    except OSError as e:
        raise RefusedError(f"the RAM file {path} cannot be read: {e.strerror}.", "hvctl doctor") from e


def data(fd: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The extents of a file, or of its bytes from start to size, that are not holes: start and end, whole pages."""
    end = start
    while end < size:
        found = data_from(fd, end)
        if found is None or found >= size:
            return
        start = found
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start // PAGE * PAGE, min(-(-end // PAGE) * PAGE, size)


def data_from(fd: int, offset: int) -> int | None:
    """Where the first data at or after a byte are; None if there are none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as e:
        if e.errno == ENXIO:
            return None
        raise


def used(fd: int, size: int, step: int, start: int = 0) -> Iterator[int]:
    """The pieces of `step` bytes, from byte `start` to `size`, that are not holes altogether, by number."""
    at = start
    while at < size:
        found = data_from(fd, at)
        if found is None or found >= size:
            return
        piece = found // step
        yield piece
        at = (piece + 1) * step


def read(fd: int, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as e:
            raise HvctlError(f"RAM cannot be read at {offset + done}: {e.strerror}.") from e
        if not got:
            raise HvctlError(f"RAM ends at {offset + done}: the file was cut while it was read.")
        done += got


def write(fd: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        try:
            put = os.pwrite(fd, content[done:], offset + done)
        except OSError as e:
            raise _no_space(e) if e.errno == ENOSPC else HvctlError(f"RAM cannot be written: {e.strerror}.") from e
        if not put:
            raise HvctlError("RAM cannot be written: the kernel took nothing.")
        done += put


def clear(fd: int, offset: int, length: int) -> None:
    """Give pages back to the host, as QEMU itself does for the balloon: every mapping of the file (KVM's too) is told,
    and the guest finds zeros. What pins pages (VFIO) would not be, but it also forbids QEMU to save state."""
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, length):
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
