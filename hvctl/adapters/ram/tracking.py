"""The dirty tracker of one QEMU process over many operations: chosen by a probe, armed, gone on with, distrusted.

What is known is a small file on the tmpfs of the snapshots. Before the tracker is asked it says that nothing is known,
since asking arms it again: whoever dies after that leaves it so, and the next reset compares all RAM. What is known
then is written when the tracking is closed: a file takes longer than the guest should stand still.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl import codec
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.pages import Chunks, Pages
from hvctl.adapters.ram.trackers import Tracker, end_tracker, open_tracker, resume_tracker, self_probe
from hvctl.errors import DeadlineError, HvctlError, RefusedError
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import Process

STATE: Final = "tracking.json"
CARRIED: Final = "carried"
PASSED: Final = "it passed its probe on this VM"
FAST: Final = (TrackerKind.UFFD, TrackerKind.SOFT_DIRTY)


class RamTracking:
    """The tracking of the process that maps `ram`; folder is the VM's among the snapshots. What it learns counts for
    the next one only when it was closed."""

    def __init__(self, folder: Path, process: Process, ram: GuestRam) -> None:
        self._folder = folder
        self._file = str(folder / STATE)
        self._ram = ram
        self._tracker: Tracker | None = None
        self.state = self._told = _load(folder, process, ram) or Tracking(process, ram.regions)
        self._chunks: Chunks | None = None
        self._asked: tuple[Chunks, NDArray[np.int64]] | None = None  # the chunks that were looked at last, as ranges

    def close(self) -> None:
        """Tell what is known, and let go of the tracker."""
        if self.state != self._told:
            # Without room, or when the last snapshot went meanwhile, nothing is known: so the file says already.
            with suppress(OSError):
                self._save(self.state)
        self.let_go()

    def let_go(self) -> None:
        """What the kernel does for one that dies: the tracker stays in the process, and nothing is told."""
        if self._tracker is not None:
            self._tracker.close()
        self._tracker = None

    def confine(self, chunks: Chunks) -> None:
        """The base holds nothing outside these chunks. So a page is different only there or where RAM holds something
        now, and nowhere else must writes be looked for. (Pages that are taken from the guest in between are another
        matter: see `inflations`.)"""
        self._chunks = chunks if self._chunks is None else self._chunks | chunks

    def _where(self) -> NDArray[np.int64] | None:
        """What the tracker must look at."""
        if self._chunks is None:
            return None
        self._chunks = self._ram.used(self._chunks)
        if self._asked is None or not np.array_equal(self._asked[0], self._chunks):
            self._asked = self._chunks, pg.chunk_ranges(self._chunks)
        return self._asked[1]

    def foresee(self, wanted: TrackerKind) -> None:
        """What takes long of `arm`, while the guest still runs: the tracker that it will try first is put into the
        process, as one that was not tried yet."""
        for kind in () if self._resumed(wanted) else _kinds(wanted):
            if kind.value not in self.state.disabled:
                with suppress(RefusedError, DeadlineError):
                    self._open(kind)
                return

    def arm(self, wanted: TrackerKind) -> None:
        """From now on writes are noted, by the tracker that is there or by the best of `wanted` that passes its probe;
        nothing is known of what was before. The guest is paused."""
        self._forget()
        self._chunks = self._ram.used()
        if self.state.reason == PASSED and self._resumed(wanted):
            try:
                self._taken()
                return
            except RefusedError as e:
                self._distrust(self.state.kind, e.message)
        reasons = []
        for kind in _kinds(wanted):
            if kind.value in self.state.disabled:
                reasons.append(f"{kind}: {self.state.disabled[kind.value]}")
                continue
            try:
                tracker = self._open(kind)
                self_probe(tracker, self.state.process.pid, self._ram.spans(), self._where())
                tracker.arm(self._where())
                self._save(replace(self.state, reason=PASSED))
                return
            except (
                RefusedError,
                DeadlineError,
            ) as e:  # The latter: QEMU is too busy to be stopped. Comparing needs no stop.
                reasons.append(f"{kind}: {e.message}")
        self.end()
        if wanted is not TrackerKind.AUTO and reasons:
            raise RefusedError(f"the tracker {wanted} cannot be used: {reasons[0]}", "--tracker auto takes what works")
        self._save(replace(self.state, kind=TrackerKind.COMPARE, reason="; ".join(reasons) or "as asked", token=""))

    def _open(self, kind: TrackerKind) -> Tracker:
        """The tracker in the process, as one that was not tried yet; the one that is there if it is of that kind."""
        if self._tracker is None or self.state.kind is not kind:
            self.end()
            self._tracker = open_tracker(kind.value, self.state.process.pid, self._ram.spans())
        self._save(replace(self.state, kind=kind, token=self._tracker.token(), reason=""))
        return self._tracker

    def end(self) -> None:
        """The tracker leaves the process; nothing is known any more."""
        self._forget()
        if self.state.token:
            self.let_go()
            with suppress(RefusedError):
                end_tracker(self.state.kind.value, self.state.process.pid, self._ram.spans(), self.state.token)
            self._save(replace(self.state, kind=TrackerKind.COMPARE, token=""))

    def expected(self, wanted: TrackerKind) -> tuple[str, Pages] | None:
        """What `written` would answer now, while the guest runs and if it gave nothing away; changes nothing."""
        base = self._base(wanted, self.state.inflations)
        if base is None or self._tracker is None:
            return None
        try:
            return base, pg.union(pg.of_spans(self._tracker.peek(self._where())), self._carried())
        except RefusedError:
            return None

    def written(self, wanted: TrackerKind, inflations: int | None) -> tuple[str, Pages] | None:
        """The snapshot that RAM is of, and the pages that differ from it; None if that is not known.

        What was known is gone after it: `settle` says what RAM is then. inflations None: it was just compared."""
        base = self._base(wanted, inflations)
        if base is None:
            return None
        try:
            carried = self._carried()
        except RefusedError:
            self._forget()
            return None
        self._forget()
        try:
            return base, pg.union(self._taken(), carried)
        except RefusedError as e:
            self._distrust(self.state.kind, e.message)
            return None

    def _base(self, wanted: TrackerKind, inflations: int | None) -> str | None:
        """The snapshot that RAM is of but for what the tracker tells; None if that is not known."""
        quiet = inflations is not None and inflations == self.state.inflations
        return self.state.base if quiet and self.state.base is not None and self._resumed(wanted) else None

    def again(self) -> Pages | None:
        """What was written since `written` or `arm` of this same pause or pass; None without a fast tracker."""
        return self._taken() if self._tracker is not None else None

    def settle(self, base: str, pages: Pages = pg.NONE, *, inflations: int | None = None, reset: bool = False) -> None:
        """From here on RAM is that of `base`, but for `pages` and what the tracker will report."""
        self.state = replace(self.state, resets=self.state.resets + reset)
        if self._tracker is None:
            return
        if pages.size:
            _write(self._folder / CARRIED, pages)
        self.state = replace(self.state, base=base, carried=pages.size, inflations=inflations)

    def rebase(self, gone: str, base: str | None, own: Pages) -> None:
        """The snapshot `gone` is deleted; what only it held (`own`) differs from its parent `base`."""
        if self.state.base != gone:
            return
        try:
            carried = pg.union(self._carried(), own)
        except RefusedError:
            base = None
        self._forget()
        if base is None:
            return
        _write(self._folder / CARRIED, carried)
        self._save(replace(self.state, base=base, carried=carried.size))

    def distrust(self, why: str) -> None:
        """The tracker in use was wrong: it is ended, and not used for this process again."""
        self._distrust(self.state.kind, why)

    def _distrust(self, kind: TrackerKind, why: str) -> None:
        self.end()
        self._save(replace(self.state, disabled={**self.state.disabled, kind.value: why}))

    def _resumed(self, wanted: TrackerKind) -> bool:
        if self.state.kind not in FAST or wanted not in (TrackerKind.AUTO, self.state.kind):
            return False
        if self._tracker is None:
            try:
                pid, spans = self.state.process.pid, self._ram.spans()
                self._tracker = resume_tracker(self.state.kind.value, pid, spans, self.state.token)
            except RefusedError:
                return False
        return True

    def _taken(self) -> Pages:
        assert self._tracker is not None
        return pg.of_spans(self._tracker.collect(self._where()))

    def _carried(self) -> Pages:
        if not self.state.carried:
            return pg.NONE
        try:
            content = (self._folder / CARRIED).read_bytes()
        except OSError as e:
            raise RefusedError(f"what was noted of the writes cannot be read: {e.strerror}.") from e
        if len(content) != self.state.carried * 8:
            raise RefusedError("what was noted of the writes is damaged.")
        return np.frombuffer(content, np.int64)

    def claim(self) -> None:
        """Have the file say now, while the guest runs, that nothing is known, as it must before the tracker is asked;
        it is told what is known when this is closed."""
        if self._told.base is not None or self._told.carried:
            self._tell(replace(self.state, base=None, carried=0))

    def _forget(self) -> None:
        self.claim()
        self.state = replace(self.state, base=None, carried=0)

    def _save(self, state: Tracking) -> None:
        self.state = state
        self._tell(state)

    def _tell(self, state: Tracking) -> None:
        _write_state(self._file, codec.dump_json(state))
        self._told = state


def _kinds(wanted: TrackerKind) -> Sequence[TrackerKind]:
    """What may be tried for it, the best first."""
    if wanted is TrackerKind.AUTO:
        return FAST
    return () if wanted is TrackerKind.COMPARE else (wanted,)


def known(folder: Path, process: Process) -> Tracking | None:
    """What the file says of this process, for those who only want to know."""
    try:
        state = codec.load_json(Tracking, (folder / STATE).read_bytes())
    except (OSError, HvctlError):
        return None
    return state if state.process == process else None


def _load(folder: Path, process: Process, ram: GuestRam) -> Tracking | None:
    state = known(folder, process)
    return state if state is not None and state.regions == ram.regions else None


def _write(path: Path, pages: Pages) -> None:
    _write_state(str(path), pages.tobytes())


def _write_state(path: str, content: bytes) -> None:
    """Replaced whole. It lives on a tmpfs, which survives the death of hvctl and nothing more, so nothing is synced."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(content)
    os.replace(new, path)  # noqa: PTH105 - a Path costs as much as the write, and the guest is paused
