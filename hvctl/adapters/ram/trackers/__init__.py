"""Dirty trackers: which pages of a QEMU process's guest RAM were written, seen from outside and in milliseconds.

They see what is written through the page tables of that process: by the guest's vCPUs, by QEMU's devices, and by the
kernel on its behalf. They do not see what other processes write into the RAM file (hvctl itself, vhost-user, virtiofsd)
or what a device writes by DMA, nor that a page was given back to the host (balloon): see DISCARDS below.

Life of a tracker: open, probe itself, arm, then any number of collects, in this process or, by its token, in a later
one. After an error of arm or collect nothing is known any more: compare all RAM.

DISCARDS. uffd: a page that is punched out of the file, by whomever, is afterwards clean if it was clean and written if
it was written; that the discard made it zero is not seen, and reading it again neither. Whatever is written into it
later is. Seen on Linux 6.18 for FALLOC_FL_PUNCH_HOLE from this process and from QEMU, MADV_REMOVE and MADV_DONTNEED,
for single pages and for whole page tables. soft-dirty: a page that is not in the page table counts as written.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram.trackers.mappings import Span, spans
from hvctl.adapters.ram.trackers.selfprobe import self_probe
from hvctl.adapters.ram.trackers.softdirty import SoftDirty, open_soft_dirty, resume_soft_dirty
from hvctl.adapters.ram.trackers.userfault import Userfault, end_userfault, open_userfault, resume_userfault
from hvctl.errors import UsageError

__all__ = ["Span", "Tracker", "end_tracker", "open_tracker", "resume_tracker", "self_probe", "spans"]


class Tracker(Protocol):
    """One way to see written pages. Nothing is clean before the first arm.

    where: the ranges of the file to look at, [start, end) in bytes; None is all of it. Of the rest nothing is said, and
    nothing changed: it costs uffd page tables to say so of RAM that the guest never used."""

    @property
    def kind(self) -> str:
        """uffd or soft-dirty."""
        ...

    def arm(self, where: NDArray[np.int64] | None = None, /) -> None:
        """Everything is clean from now on. RefusedError: the tracker lost its hold."""
        ...

    def collect(self, where: NDArray[np.int64] | None = None, /) -> NDArray[np.int64]:
        """Pages written since the last arm or collect, as rows of [start, end) in bytes of the RAM file, sorted and
        disjoint. They are clean from then on: for uffd in the same step, so that a running guest loses nothing; with
        soft-dirty the guest must be paused. RefusedError: the tracker lost its hold; what was dirty is not known."""
        ...

    def peek(self, where: NDArray[np.int64] | None = None, /) -> NDArray[np.int64]:
        """What collect would answer now, for one who wants to be prepared; changes nothing. Errors as of collect."""
        ...

    def token(self) -> str:
        """With which another hvctl goes on."""
        ...

    def close(self) -> None:
        """Only what this process holds. The tracking goes on."""
        ...


def open_tracker(kind: str, pid: int, spans: tuple[Span, ...]) -> Tracker:
    """A new tracker, or the one that an earlier hvctl left in the process; what that one knew is lost, so arm it. The
    descriptor of uffd is one of the process's own until end_tracker. The guest need not be paused for it: this is what
    takes time with much resident RAM, and arm is quick afterwards.

    RefusedError: this kernel or process has it not. UnreachableError: the process is gone. DeadlineError: it is
    stopped (SIGSTOP, a freezer) and could not be asked.
    """
    match kind:
        case Userfault.kind:
            return open_userfault(pid, spans)
        case SoftDirty.kind:
            return open_soft_dirty(pid, spans)
    raise UsageError(f"there is no tracker {kind!r}.", "hvctl reset --help")


def resume_tracker(kind: str, pid: int, spans: tuple[Span, ...], token: str) -> Tracker:
    """Go on with what the token names; the process is not stopped for it. RefusedError: it is not there any more."""
    match kind:
        case Userfault.kind:
            return resume_userfault(pid, spans, token)
        case SoftDirty.kind:
            return resume_soft_dirty(pid, spans, token)
    raise UsageError(f"there is no tracker {kind!r}.", "hvctl reset --help")


def end_tracker(kind: str, pid: int, spans: tuple[Span, ...], token: str) -> None:
    """Nothing of it stays in the process. May be repeated, and after the end of the process. Errors as of
    open_tracker."""
    if kind == Userfault.kind:
        end_userfault(pid, spans, token)
