"""/proc/PID/pagemap: the scan that finds written pages and protects them again in one step, and the plain table.

Numbers from linux/fs.h of kernel 6.7 and Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram.trackers.mappings import PROC

PAGE: Final = 4096
Ranges = NDArray[np.int64]
PRESENT: Final = 1 << 63
SOFT_DIRTY: Final = 1 << 55
# What one system call can bring back: regions of a scan (24 bytes each), entries of the table (8 bytes each).
REGIONS: Final = 32768
ENTRIES: Final = 65536

_PAGEMAP_SCAN: Final = 0xC0606610
_SCAN: Final = struct.Struct("=12Q")  # struct pm_scan_arg
_WALK_END: Final = 4
_WP_MATCHING: Final = 1 << 0
_CHECK_WPASYNC: Final = 1 << 1
_IS_WRITTEN: Final = 1 << 1
_IS_PRESENT: Final = 1 << 3


class Pagemap:
    """The pages of one process."""

    def __init__(self, pid: int, proc: Path = PROC, regions: int = REGIONS, entries: int = ENTRIES) -> None:
        """OSError: the process is gone or not ours to look at."""
        self._fd = os.open(proc / str(pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.empty((regions, 3), np.int64)  # start, end, categories: struct page_region
        self._entries = entries

    def close(self) -> None:
        os.close(self._fd)

    def take_written(self, start: int, end: int) -> Iterator[Ranges]:
        """Addresses [start, end) of pages that are not write-protected, which are so afterwards: a write is either in
        this answer or in the next one, also while the process runs. One array for each time that the vector was full.

        OSError EPERM: part of it is not under asynchronous write protection. What was protected before the
        error is then lost. Nothing is said of parts that are not mapped.
        """
        while start < end:
            found, start = self._scan(start, end, _WP_MATCHING | _CHECK_WPASYNC, len(self._regions))
            if found:
                yield self._regions[:found, :2].copy()

    def written(self, start: int, end: int) -> Iterator[Ranges]:
        """What take_written would answer now; changes nothing."""
        while start < end:
            found, start = self._scan(start, end, _CHECK_WPASYNC, len(self._regions))
            if found:
                yield self._regions[:found, :2].copy()

    def protect(self, start: int, end: int) -> None:
        """Write-protect all pages that are not, also those that do not exist yet. Errors as of take_written."""
        while start < end:
            request = bytearray(_SCAN.pack(_SCAN.size, _WP_MATCHING | _CHECK_WPASYNC, start, end, *[0] * 8))
            fcntl.ioctl(self._fd, _PAGEMAP_SCAN, request, True)
            start = int(_SCAN.unpack(request)[_WALK_END])

    def populated(self, start: int, end: int) -> Iterator[Ranges]:
        """Addresses [start, end) of pages that are in the page table, whoever tracks them."""
        while start < end:
            found, start = self._scan(start, end, 0, len(self._regions), _IS_PRESENT)
            if found:
                yield self._regions[:found, :2].copy()

    def check_tracked(self, address: int) -> None:
        """OSError EPERM: the mapping of this page is not under asynchronous write protection. Changes nothing."""
        self._scan(address, address + PAGE, _CHECK_WPASYNC, 1)

    def _scan(self, start: int, end: int, flags: int, room: int, category: int = _IS_WRITTEN) -> tuple[int, int]:
        """How many regions were filled in, and where the walk ended."""
        request = bytearray(
            _SCAN.pack(_SCAN.size, flags, start, end, 0, self._regions.ctypes.data, room, 0, 0, category, 0, category)
        )
        found = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, request, True)
        return found, int(_SCAN.unpack(request)[_WALK_END])

    def table(self, start: int, end: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """The entries of all pages from start to end, in pieces, each with the address of its first one. OSError: the
        table ends early, as that of a dead process does."""
        for first in range(start // PAGE, end // PAGE, self._entries):
            count = min(self._entries, end // PAGE - first)
            into = np.empty(count, np.uint64)
            if os.preadv(self._fd, [into.data], first * 8) != into.nbytes:
                raise ProcessLookupError("the table of pages ends early")
            yield first * PAGE, into


def runs(first: int, which: NDArray[np.bool_]) -> Ranges:
    """Addresses [start, end) of the pages that are true, the first of which is at address `first`."""
    edges = np.flatnonzero(np.diff(which, prepend=False, append=False))
    return first + edges.reshape(-1, 2) * PAGE


def merged(pieces: list[Ranges]) -> Ranges:
    """One sorted row of disjoint ranges that do not touch."""
    ranges = np.concatenate([np.empty((0, 2), np.int64), *pieces])
    if len(ranges) < 2:
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    starts, ends = ranges[:, 0], np.maximum.accumulate(ranges[:, 1])
    gaps = starts[1:] > ends[:-1]
    return np.stack((starts[np.append(True, gaps)], ends[np.append(gaps, True)]), axis=1)
