"""The soft-dirty bit of the page tables, cleared by writing 4 to clear_refs. For kernels that have no asynchronous
write protection; a kernel without the bit takes the request and then calls every page clean, so only after a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from hvctl.adapters.kernel import process
from hvctl.adapters.ram.trackers.mappings import PROC, MappedSpans, Span
from hvctl.adapters.ram.trackers.pagemap import PRESENT, SOFT_DIRTY, Pagemap, Ranges, merged, runs
from hvctl.errors import RefusedError

COMPARE: Final = "hvctl reset --tracker compare"


class SoftDirty:
    """The guest must be paused while this collects. The bits of a page go with its entry in the page table (when the
    kernel takes the page away, when it is given back), so a page without an entry counts as written. It looks at all
    of RAM, wherever it is told to look."""

    kind = "soft-dirty"

    def __init__(self, pid: int, spans: tuple[Span, ...], proc: Path = PROC) -> None:
        """OSError: the process is gone, or not ours to look at."""
        self._pid, self._spans, self._clear = pid, spans, proc / str(pid) / "clear_refs"
        self._started = process.start_time(pid)
        self._pagemap = Pagemap(pid, proc)
        try:
            self._mapped = MappedSpans(pid, spans, proc)
        except BaseException:
            self._pagemap.close()
            raise

    def arm(self, _where: Ranges | None = None, /) -> None:
        try:
            self._clear.write_text("4")
        except OSError as e:
            raise self._lost(e.strerror or str(e)) from e

    def collect(self, where: Ranges | None = None, /) -> Ranges:
        found = self.peek(where)
        self.arm()
        return found

    def peek(self, _where: Ranges | None = None, /) -> Ranges:
        found = []
        try:
            for span in self._spans:
                for first, entries in self._pagemap.table(span.address, span.address + span.length):
                    written = (entries & np.uint64(PRESENT | SOFT_DIRTY)) != PRESENT
                    found.append(runs(first, written) + (span.offset - span.address))
        except OSError as e:
            raise self._lost(e.strerror or str(e)) from e
        if not self._mapped.whole():
            raise self._lost("a part of it is not mapped any more")
        return merged(found)

    def token(self) -> str:
        return str(self._started)

    def close(self) -> None:
        self._mapped.close()
        self._pagemap.close()

    def _lost(self, reason: str) -> RefusedError:
        return RefusedError(f"the tracker lost its hold on the RAM of process {self._pid}: {reason}.", COMPARE)


def open_soft_dirty(pid: int, spans: tuple[Span, ...]) -> SoftDirty:
    """RefusedError: the process is gone, or not ours to look at."""
    try:
        return SoftDirty(pid, spans)
    except OSError as e:
        raise RefusedError(f"the pages of process {pid} cannot be read: {e.strerror}.", COMPARE) from e


def resume_soft_dirty(pid: int, spans: tuple[Span, ...], token: str) -> SoftDirty:
    """RefusedError: it is another process."""
    tracker = open_soft_dirty(pid, spans)
    if tracker.token() != token:
        tracker.close()
        raise RefusedError(f"process {pid} is not the one that was tracked.", COMPARE)
    return tracker
