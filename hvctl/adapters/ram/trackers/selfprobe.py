"""Whether a tracker tells the truth about this very process: bytes of a few pages are written with what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple, Protocol

import numpy as np

from hvctl.adapters.ram.trackers.mappings import PROC, Span
from hvctl.adapters.ram.trackers.pagemap import PAGE, PRESENT, Pagemap, Ranges
from hvctl.errors import RefusedError

_WINDOW: Final = 512  # pages of which the table is read at once
_LOOKS: Final = 64  # windows, spread over all RAM
_OF_EACH: Final = 5
_BYTES: Final = 8


class _Tracks(Protocol):
    @property
    def kind(self) -> str: ...

    def arm(self, where: Ranges | None = None, /) -> None: ...

    def collect(self, where: Ranges | None = None, /) -> Ranges: ...


class _Page(NamedTuple):
    address: int  # in the process
    offset: int  # in the file


def self_probe(tracker: _Tracks, pid: int, spans: tuple[Span, ...], where: Ranges | None = None) -> None:
    """RefusedError: the tracker misses a write, or sees one where there is none. The guest is paused, and its RAM is
    the same afterwards. What the tracker knew before is lost: arm it after this. where: as in Tracker."""
    try:
        pagemap = Pagemap(pid, entries=_WINDOW)
        try:
            memory = os.open(PROC / str(pid) / "mem", os.O_RDWR | os.O_CLOEXEC)
            try:
                _probe(tracker, pagemap, memory, spans, where)
            finally:
                os.close(memory)
        finally:
            pagemap.close()
    except OSError as e:
        raise RefusedError(f"the memory of process {pid} cannot be written: {e.strerror}.", "hvctl doctor") from e


def _probe(tracker: _Tracks, pagemap: Pagemap, memory: int, spans: tuple[Span, ...], where: Ranges | None) -> None:
    some, others = _sample(pagemap, spans)
    tracker.arm(where)
    # Each answer has to arm again, so there is more than one; what is only read shows up in none of them.
    for written, read in ((some, others), ([], some), (others, some)):
        for page in read:
            _read(memory, page.address)
        for page in written:
            _rewrite(memory, page.address)
        seen = tracker.collect(where)
        missed = [p.offset for p in written if not ((seen[:, 0] <= p.offset) & (p.offset < seen[:, 1])).any()]
        if missed:
            raise RefusedError(
                f"the tracker {tracker.kind} misses writes: {len(missed)} of {len(written)} in its probe.",
                "hvctl doctor",
            )
        untrue = _present(pagemap, seen, spans) - {p.offset for p in written}
        if untrue:
            raise RefusedError(
                f"the tracker {tracker.kind} sees writes where there are none: {len(untrue)} in its probe.",
                "pause the VM" if written else "hvctl doctor",
            )


def _sample(pagemap: Pagemap, spans: tuple[Span, ...]) -> tuple[list[_Page], list[_Page]]:
    """Pages that exist, from all over RAM: one near its start, one in the middle, one near its end; and neighbours of
    these. Not surely the very first and last: to look at every entry of 4 GiB takes 30 ms, and the guest is paused."""
    windows = [
        Span(s.address + at, s.offset + at, min(_WINDOW * PAGE, s.length - at))
        for s in spans
        for at in range(0, s.length, _WINDOW * PAGE)
    ]
    spread = [*windows[:: len(windows) // _LOOKS + 1], *windows[-1:]]
    found = list(_populated(pagemap, spread)) or list(islice(_populated(pagemap, windows), 1))
    if not found:
        raise RefusedError("no page of the VM's RAM is in use: there is nothing to try a tracker on.", "start the VM")
    first, middle, last = found[0], found[len(found) // 2], found[-1]
    some = {first[0], middle[len(middle) // 2], last[-1]}
    return sorted(some), sorted({*first[1:2], *middle[:1], *last[-2:-1]} - some)


def _populated(pagemap: Pagemap, windows: list[Span]) -> Iterator[list[_Page]]:
    """A few pages of each of the windows that has any: its first and last ones, and some between them."""
    for window in windows:
        ((_, entries),) = pagemap.table(window.address, window.address + window.length)
        at = np.flatnonzero(entries & np.uint64(PRESENT)) * PAGE
        if at.size:
            few = np.unique(at[np.linspace(0, at.size - 1, _OF_EACH).astype(np.int64)]).tolist()
            yield [_Page(window.address + a, window.offset + a) for a in few]


def _present(pagemap: Pagemap, seen: Ranges, spans: tuple[Span, ...]) -> set[int]:
    """Offsets of the pages among these ranges that are in the page table; of others a tracker may say what it likes."""
    found: set[int] = set()
    for span in spans:
        for start, end in np.clip(seen, span.offset, span.offset + span.length).tolist():
            shift = span.offset - span.address
            for first, entries in pagemap.table(start - shift, end - shift):
                found.update((np.flatnonzero(entries & np.uint64(PRESENT)) * PAGE + first + shift).tolist())
    return found


def _read(memory: int, address: int) -> bytes:
    content = os.pread(memory, _BYTES, address)
    if len(content) != _BYTES:
        raise ProcessLookupError(0, "it is gone")
    return content


def _rewrite(memory: int, address: int) -> None:
    """After the death of the process this returns 0 and raises nothing."""
    if os.pwrite(memory, _read(memory, address), address) != _BYTES:
        raise ProcessLookupError(0, "it is gone")
