"""Page numbers in numpy, and moving many pages with one system call.

All RAM of a VM is one row of 4 KiB pages, its regions one after the other; a set of pages is a sorted int64 array.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.kernel import processmemory
from hvctl.adapters.kernel.urgency import urgent
from hvctl.errors import HvctlError

PAGE: Final = 4096
CHUNK: Final = 512  # pages of one page table
Pages = NDArray[np.int64]
Chunks = NDArray[np.bool_]  # one for each CHUNK pages of the row
Addresses = NDArray[np.int64]
_Vectors = NDArray[np.uint64]
_Call = Callable[[int, int, int, int], int]
NONE: Final[Pages] = np.empty(0, np.int64)
_VECTORS: Final = processmemory.MOST
_LONGEST: Final = 64  # pages of one vector, so that a call stays below the kernel's 2 GiB
_SHARED: Final = 1024  # pages from which on two threads are faster than one
_PARTS: Final = 16  # of equal size, which the threads take one after the other
_WORDS: Final = np.empty(_VECTORS, np.uint64)


def of_spans(spans: NDArray[np.int64]) -> Pages:
    """The pages of (n, 2) byte ranges that are sorted and disjoint."""
    if not len(spans):
        return NONE
    first, last = spans[:, 0] // PAGE, -(-spans[:, 1] // PAGE)
    counts = last - first
    ends = np.cumsum(counts)
    steps = np.ones(int(ends[-1]), np.int64)
    steps[0] = first[0]
    steps[ends[:-1]] = first[1:] - last[:-1] + 1
    return np.cumsum(steps)


def runs(pages: Pages) -> NDArray[np.int64]:
    """(n, 2) of first page and count, neighbours joined."""
    if not pages.size:
        return np.empty((0, 2), np.int64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    return np.stack((pages[starts], np.diff(np.concatenate((starts, [pages.size])))), axis=1)


def chunk_ranges(chunks: Chunks) -> NDArray[np.int64]:
    """(n, 2) byte ranges of the chunks that are true."""
    edges = np.flatnonzero(np.diff(chunks, prepend=False, append=False))
    return np.asarray(edges.reshape(-1, 2) * (CHUNK * PAGE))


def span(first: int, last: int) -> Pages:
    """Pages from first up to, not including, last."""
    return np.arange(first, last, dtype=np.int64)


def union(*sets: Pages) -> Pages:
    some = [pages for pages in sets if pages.size]
    if len(some) < 2:
        return some[0] if some else NONE
    return np.unique(np.concatenate(some))


def without(pages: Pages, gone: Pages, of: int) -> Pages:
    """Those of the pages that are not among `gone`; of: how many there are in the row."""
    left = np.zeros(of, np.bool_)
    left[pages] = True
    left[gone] = False
    return np.flatnonzero(left)


def read(own: Addresses, guest: Addresses) -> None:
    """Copy whole pages from `guest` addresses of this process to `own` ones.

    Through the kernel and not by plain loads: a mapping of a file that QEMU owns may be cut short at any moment, which
    must be an error (HvctlError) and not a signal. Neighbouring pages go as one vector.
    """
    _move(processmemory.read, own, guest)


def touch(there: Addresses) -> None:
    """Have whole pages at addresses of this process in its page table, so that reading or writing them soon takes no
    faults, which cost more than the copy. What is in them stays as it is."""
    _move(processmemory.read, _WORDS.ctypes.data + np.arange(there.size, dtype=np.int64) % _VECTORS * 8, there, 8)


def write(own: Addresses, guest: Addresses) -> None:
    """Copy whole pages from `own` addresses of this process to `guest` ones; see read."""
    _move(processmemory.write, own, guest)


@dataclass(frozen=True, slots=True)
class Copy:
    """What moves many pages, worked out before it is done: for each system call the vectors here and there, and their
    bytes in all."""

    calls: tuple[tuple[_Vectors, _Vectors, int], ...]
    many: bool  # so that two threads are faster than one


@contextmanager
def writing(copy: Copy) -> Iterator[None]:
    """As write, which another thread begins at once, while the caller does something else; it is done at the end."""
    with _moving(processmemory.write, copy):
        yield


def _move(call: _Call, own: Addresses, guest: Addresses, size: int = PAGE) -> None:
    with _moving(call, copying(own, guest, size)):
        pass


@contextmanager
def _moving(call: _Call, copy: Copy) -> Iterator[None]:
    """Many pages are moved by two threads, the caller's from the end of the context on: memory that no cache holds is
    what takes the time, and each processor waits for its own."""
    left = deque(copy.calls)

    def some() -> None:
        while left:
            try:
                local, remote, wanted = left.popleft()
            except IndexError:  # the other thread was quicker
                return
            try:
                done = call(os.getpid(), local.ctypes.data, remote.ctypes.data, len(local))
            except OSError as e:
                raise _uncopied(str(e.strerror)) from e
            if done != wanted:
                raise _uncopied(f"{done} of {wanted} bytes")

    other = _second_thread().submit(some) if copy.many else None
    try:
        yield
    finally:
        try:
            some()
        finally:
            if other is not None:
                other.result()


def copying(own: Addresses, guest: Addresses, size: int = PAGE) -> Copy:
    """Between `own` and `guest` addresses of this process; size: bytes at each."""
    if not own.size:
        return Copy((), many=False)
    breaks = (np.diff(own) != size) | (np.diff(guest) != size)
    breaks[_LONGEST - 1 :: _LONGEST] = True
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lengths = np.diff(np.concatenate((starts, [own.size]))) * size
    local = np.ascontiguousarray(np.stack((own[starts], lengths), axis=1), np.uint64)
    remote = np.ascontiguousarray(np.stack((guest[starts], lengths), axis=1), np.uint64)
    firsts = np.arange(0, lengths.size, _VECTORS)
    many = own.size > _SHARED
    if many:
        before = np.cumsum(lengths) - lengths
        firsts = np.union1d(firsts, np.searchsorted(before, own.size * size // _PARTS * np.arange(_PARTS)))
        firsts = firsts[firsts < lengths.size]
    ends = np.append(firsts[1:], lengths.size).tolist()
    wanted = np.add.reduceat(lengths, firsts).tolist()
    spans = zip(firsts.tolist(), ends, wanted, strict=True)
    return Copy(tuple((local[a:b], remote[a:b], w) for a, b, w in spans), many)


def _uncopied(reason: str) -> HvctlError:
    return HvctlError(f"guest RAM cannot be copied: {reason}: its file was cut, or the host has no memory left.")


@contextmanager
def urgent_copies() -> Iterator[None]:
    """The second thread stands before all others of the host, if that is allowed. It is so before it has anything to
    do: one that asks for it when it runs has waited for a processor until then, as long as a whole copy takes."""
    with urgent(_second_thread().submit(threading.get_native_id).result()):
        yield


@cache
def _second_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "pages")


os.register_at_fork(after_in_child=_second_thread.cache_clear)  # a child has no thread but its first
