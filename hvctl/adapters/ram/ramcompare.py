"""The compare tracker: reads all resident RAM and the snapshot's, finds the pages that differ, and mends them if asked.

It needs nothing from the kernel, and is the oracle that faster trackers are checked against. The guest must be paused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.pages import PAGE, Addresses, Pages

# One piece of both sides fits the second-level cache, so the compare runs at the speed of the reads.
PIECE: Final = 64
THREADS: Final = 2
_WORDS: Final = PAGE // 8
_KEPT: Final = 4096  # pages
_GIVEN_BACK: Final = 64  # pages of a run
_ZEROS: Final = np.zeros(_WORDS, np.uint64)


def restore(guest: GuestRam, chain: Chain) -> Pages:
    """Make guest RAM equal to the snapshot; the pages that differed."""
    return _compare(guest, chain, lambda first, unequal, wanted: _mend(guest, first, unequal, wanted))


def difference(guest: GuestRam, chain: Chain) -> Pages:
    """The pages of guest RAM that are not as in the snapshot."""
    return _compare(guest, chain, lambda _first, _unequal, _wanted: None)


@dataclass(frozen=True, slots=True)
class Patch:
    """Pages as a snapshot has them: what writes those that are written, and which are given back."""

    pages: Pages
    copy: pg.Copy
    back: Pages


NOTHING: Final = Patch(pg.NONE, pg.copying(pg.NONE, pg.NONE), pg.NONE)


def write(guest: GuestRam, chain: Chain, pages: Pages, *, exist: bool = False) -> int:
    """Write these pages as the snapshot has them; bytes. exist: the guest wrote them all, so there are no holes."""
    if pages.size:
        written, source, back = _sources(guest, chain, pages, exist)
        guest.write(written, source)
        guest.clear(back)
    return pages.size * PAGE


@contextmanager
def writing(guest: GuestRam, patch: Patch) -> Iterator[Pages]:
    """Another thread begins with it while the caller does something else; at the end these pages are written."""
    with pg.writing(patch.copy):
        yield patch.pages
    guest.clear(patch.back)


def foresee(guest: GuestRam, chain: Chain, pages: Pages, *, exist: bool = False) -> Patch:
    """Before the pause, what `write` would do, with all that it needs in the page tables: these faults cost more than
    the copy."""
    written, source, back = _sources(guest, chain, pages, exist)
    pg.touch(source)
    guest.touch(written)
    return Patch(pages, guest.copying(written, source), back)


def _sources(guest: GuestRam, chain: Chain, pages: Pages, exist: bool) -> tuple[Pages, Addresses, Pages]:
    """Which of the pages are written, each from where in this process, and which are given back.

    A page that is zero in the snapshot is written like any other: to give it back takes three times as long, and as
    much again when the guest wants it. But for long runs where there are many, which are memory that the host lacks."""
    source = chain.locate(pages)
    zero = source == 0
    if not zero.any():
        return pages, source, pg.NONE
    kept, back = pages[zero] if exist else guest.existing(pages[zero]), pg.NONE
    if kept.size > _KEPT:
        counts = pg.runs(kept)[:, 1]
        long = np.repeat(counts >= _GIVEN_BACK, counts)
        kept, back = kept[~long], kept[long]
    source[zero] = _ZEROS.ctypes.data
    chosen = ~zero | np.isin(pages, kept, assume_unique=True)
    return pages[chosen], source[chosen], back


Found = Callable[[int, NDArray[np.bool_], NDArray[np.uint64]], None]


def _compare(guest: GuestRam, chain: Chain, found: Found) -> Pages:
    pieces = list(_pieces(guest, chain))

    def share(mine: list[tuple[int, int]]) -> list[Pages]:
        now, then = np.empty((PIECE, _WORDS), np.uint64), np.empty((PIECE, _WORDS), np.uint64)
        differing = []
        for first, last in mine:
            count = last - first
            guest.read_run(first, now[:count].data.cast("B"))
            _fill(chain, first, then[:count])
            if np.array_equal(now[:count], then[:count]):
                continue
            unequal = (now[:count] != then[:count]).any(axis=1)
            found(first, unequal, then[:count])
            differing.append(first + np.flatnonzero(unequal))
        return differing

    # Reading and numpy release the interpreter lock. No two pieces overlap, so no thread sees what another one writes.
    with ThreadPoolExecutor(THREADS) as pool:
        parts = [p for some in pool.map(share, (pieces[n::THREADS] for n in range(THREADS))) for p in some]
    return pg.union(*parts) if parts else pg.NONE


def _pieces(guest: GuestRam, chain: Chain) -> Iterator[tuple[int, int]]:
    """First and last-plus-one page of what must be looked at: where both have a hole, both are zero."""
    wanted = np.zeros(-(-guest.pages // PIECE) + 1, np.bool_)
    filled = chain.nonzero()
    padded = np.zeros((-(-guest.pages // PIECE)) * PIECE, np.bool_)
    padded[: guest.pages] = filled
    wanted[:-1] |= padded.reshape(-1, PIECE).any(axis=1)
    for first, last in guest.data():
        wanted[first // PIECE : -(-last // PIECE)] = True
    for piece in np.flatnonzero(wanted).tolist():
        first, last = piece * PIECE, min((piece + 1) * PIECE, guest.pages)
        while first < last:
            end = guest.same_region(first, last - 1) + 1
            yield first, end
            first = end


def _fill(chain: Chain, first: int, into: NDArray[np.uint64]) -> None:
    source = chain.locate(np.arange(first, first + len(into)))
    filled = np.flatnonzero(source)
    if filled.size < len(into):
        into[source == 0] = 0
    pg.read(into.ctypes.data + filled * PAGE, source[filled])


def _mend(guest: GuestRam, first: int, unequal: NDArray[np.bool_], wanted: NDArray[np.uint64]) -> None:
    zero = unequal & ~wanted.any(axis=1)
    for start, count in pg.runs(np.flatnonzero(unequal & ~zero)).tolist():
        guest.write_run(first + start, wanted[start : start + count].data.cast("B"))
    guest.clear(first + np.flatnonzero(zero))
