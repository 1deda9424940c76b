"""All guest RAM of one QEMU process as one row of pages: read, written and cleared through the files that it maps.

Nothing here can see whether the guest is paused; whoever writes must know.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramfile
from hvctl.adapters.ram.pages import PAGE, Addresses, Chunks, Pages
from hvctl.adapters.ram.trackers import Span
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.vm import Region

_NEAR: Final = 64  # pages
_ALONE: Final = 8  # pages: fewer cost less to write than to ask about


@dataclass(frozen=True, slots=True)
class _Piece:
    """A region, opened and mapped; first is its first page in the row."""

    region: Region
    fd: int
    map: mmap.mmap
    address: int
    first: int
    spans: tuple[Span, ...]

    @property
    def pages(self) -> int:
        return self.region.size // PAGE


class GuestRam:
    """Opened RAM of the process `pid`; RefusedError if the files are not what it maps. Close it, or use `with`."""

    def __init__(self, regions: Iterable[Region], pid: int) -> None:
        self._pieces: list[_Piece] = []
        self._first = [0]
        self._used: tuple[list[int], Chunks] | None = None
        try:
            for region in regions:
                fd, spans = ramfile.open_mapped(region.path, region.size, pid)
                try:
                    mapping = mmap.mmap(fd, region.size, mmap.MAP_SHARED)
                except (OSError, ValueError) as e:
                    os.close(fd)
                    raise HvctlError(f"{region.path} cannot be mapped: {e}.") from e
                address = address_of(mapping)
                self._pieces.append(_Piece(region, fd, mapping, address, self._first[-1], spans))
                self._first.append(self._first[-1] + region.size // PAGE)
        except BaseException:
            self.close()
            raise
        self._starts = np.array(self._first, np.int64)
        self._bases = np.array([p.address - p.first * PAGE for p in self._pieces], np.int64)

    def __enter__(self) -> GuestRam:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._pieces:
            piece = self._pieces.pop()
            piece.map.close()
            os.close(piece.fd)

    @property
    def pages(self) -> int:
        return self._first[-1]

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(p.region for p in self._pieces)

    def spans(self) -> tuple[Span, ...]:
        """Where the process maps it; offsets are bytes in the row of pages."""
        return tuple(replace(s, offset=s.offset + p.first * PAGE) for p in self._pieces for s in p.spans)

    def data(self) -> list[tuple[int, int]]:
        """First and last-plus-one pages of what is not a hole."""
        found = []
        for piece in self._pieces:
            for start, end in ramfile.data(piece.fd, piece.region.size):
                found.append((piece.first + start // PAGE, piece.first + end // PAGE))
        return found

    def used(self, known: Chunks | None = None) -> Chunks:
        """Which chunks hold anything; all others are zero. Those that are `known` to be in use are not asked about, and
        none is if RAM takes as much of the host as when this was asked last: whoever gives some of what is known must
        know that the guest gave nothing away meanwhile."""
        taken = [os.fstat(p.fd).st_blocks for p in self._pieces]
        if known is not None and self._used is not None and self._used[0] == taken:
            return known | self._used[1]
        found = np.zeros(-(-self.pages // pg.CHUNK), np.bool_) if known is None else known.copy()
        for piece in self._pieces:
            # The chunks of a piece begin with it, and so lie in one or two of the row's.
            first, shifted = divmod(piece.first, pg.CHUNK)
            asked = ~found[first : first - (-piece.pages // pg.CHUNK)] | bool(shifted)
            for start, end in pg.chunk_ranges(asked).tolist():
                for number in ramfile.used(piece.fd, min(end, piece.region.size), pg.CHUNK * PAGE, start):
                    found[first + number : first + number + 1 + bool(shifted)] = True
        self._used = taken, found
        return found.copy()

    def existing(self, pages: Pages) -> Pages:
        """Those of them that are not holes, and some holes: pages that stand alone and those right behind one that is
        there are not asked about. To find where a hole begins the kernel looks through all that lies before it, which
        may be all RAM; where data begins it knows at once."""
        found = []
        for first, count in pg.runs(pages).tolist():
            last = first + count
            while first < last:
                if last - first >= _ALONE:
                    first = self._data_from(first)
                if first < last:
                    found.append((first, min(first + _NEAR, last)))
                first += _NEAR
        return np.concatenate([pg.span(a, b) for a, b in found]) if found else pg.NONE

    def _data_from(self, page: int) -> int:
        """The first page at or after this one that is not a hole, or the end of its region."""
        piece = self._piece(page)
        start = ramfile.data_from(piece.fd, (page - piece.first) * PAGE)
        return piece.first + (piece.pages if start is None else start // PAGE)

    def resident(self) -> int:
        """Bytes of the host's memory that it takes."""
        return sum(os.fstat(p.fd).st_blocks * 512 for p in self._pieces)

    def pages_at(self, first: int, last: int) -> Pages:
        """The pages that the process has from address `first` up to `last`; RefusedError if part of it is not RAM of
        one piece."""
        for span in self.spans():
            if span.address <= first and last <= span.address + span.length:
                start = span.offset + first - span.address
                return pg.span(start // PAGE, -(-(start + last - first) // PAGE))
        raise RefusedError("the range is not guest RAM that is in a shared file.", "hvctl snapshot show")

    def read(self, pages: Pages, own: Addresses) -> None:
        pg.read(own, self._at(pages))

    def write(self, pages: Pages, own: Addresses) -> None:
        pg.write(own, self._at(pages))

    def copying(self, pages: Pages, own: Addresses) -> pg.Copy:
        """What writes them from there, for pg.writing."""
        return pg.copying(own, self._at(pages))

    def touch(self, pages: Pages) -> None:
        """Make writing these pages soon quick; holes among them are filled with zeros."""
        pg.touch(self._at(pages))

    def clear(self, pages: Pages) -> None:
        """Make pages zero by giving them back to the host."""
        if not pages.size:
            return
        self._used = None
        for piece, first, count in self._runs(pages):
            ramfile.clear(piece.fd, first * PAGE, count * PAGE)

    def read_run(self, first: int, into: memoryview) -> None:
        """Whole pages from page `first` on, within one region; holes stay holes."""
        piece = self._piece(first)
        ramfile.read(piece.fd, (first - piece.first) * PAGE, into)

    def write_run(self, first: int, content: memoryview) -> None:
        piece = self._piece(first)
        ramfile.write(piece.fd, content, (first - piece.first) * PAGE)

    def same_region(self, first: int, last: int) -> int:
        """The last of pages `first` to `last` that lies in the region of the first one."""
        piece = self._piece(first)
        return min(last, piece.first + piece.pages - 1)

    def _at(self, pages: Pages) -> Addresses:
        if len(self._pieces) == 1:
            return np.asarray(pages * PAGE + self._bases[0])
        return np.asarray(pages * PAGE + self._bases[np.searchsorted(self._starts, pages, "right") - 1])

    def _piece(self, page: int) -> _Piece:
        return self._pieces[int(np.searchsorted(self._starts, page, "right")) - 1]

    def _runs(self, pages: Pages) -> Iterable[tuple[_Piece, int, int]]:
        for piece in self._pieces:
            low, high = np.searchsorted(pages, (piece.first, piece.first + piece.pages))
            for first, count in pg.runs(pages[low:high] - piece.first).tolist():
                yield piece, first, count


def address_of(mapping: Any) -> int:
    """Where a mapping lies in this process. No array keeps a view of it, so that it can be closed."""
    view: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8, 1)
    return int(view.ctypes.data)
