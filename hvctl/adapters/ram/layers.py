"""Guest RAM of snapshots on the host: a layer per snapshot, which holds only the pages that differ from its parent's.

A layer is two files: `ram`, its pages one after the other, and `index`, one int32 for each page of guest RAM: the row
in `ram`, or that the page is zero, or that it is as in the parent. So a page is found without search, ten snapshots
cost what changed between them, and `ram` holds nothing but data.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramfile
from hvctl.adapters.ram.guestram import GuestRam, address_of
from hvctl.adapters.ram.pages import PAGE, Addresses, Chunks, Pages
from hvctl.errors import HvctlError, NotFoundError, RefusedError

RAM: Final = "ram"
INDEX: Final = "index"
INHERITED: Final = -2
ZERO: Final = -1
_CHUNK: Final = 1024  # pages: 4 MiB at a time, which the caches of the host hold


class Layer:
    """One layer, mapped; `first` reads end with NotFoundError or RefusedError if it is not whole."""

    def __init__(self, folder: Path, pages: int) -> None:
        self.folder = folder
        index = _read(folder / INDEX)
        if len(index) != pages * 4:
            raise RefusedError(
                f"{folder / INDEX} is not the index of {pages} pages: the snapshot is damaged.", "delete it"
            )
        self.index: NDArray[np.int32] = np.frombuffer(index, np.int32)
        self._ram = _read(folder / RAM)
        self.rows = len(self._ram) // PAGE
        self.address = address_of(self._ram) if self.rows else 0
        if pages and not INHERITED <= int(self.index.min()) <= int(self.index.max()) < self.rows:
            self.close()
            raise RefusedError(f"{folder} is damaged: its index names pages that it has not.", "delete it")

    def own(self) -> Pages:
        """The pages that this layer says something about."""
        return np.flatnonzero(self.index != INHERITED)

    def close(self) -> None:
        self.index = np.empty(0, np.int32)
        if isinstance(self._ram, mmap.mmap):
            self._ram.close()
        self._ram = b""


def _read(path: Path) -> mmap.mmap | bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise NotFoundError(f"the RAM of the snapshot, {path}, is not there.", "hvctl snapshot list") from e
    except OSError as e:
        raise RefusedError(f"{path} cannot be opened: {e.strerror}.", "hvctl doctor") from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError(f"{path} is not a file.", "hvctl doctor")
        return mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ) if status.st_size else b""
    finally:
        os.close(fd)


class Chain:
    """The RAM of one snapshot: its layer and those it builds on, newest first."""

    def __init__(self, folders: Sequence[Path], pages: int) -> None:
        self.pages = pages
        self.layers: list[Layer] = []
        try:
            for folder in folders:
                self.layers.append(Layer(folder, pages))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self.layers:
            self.layers.pop().close()

    def locate(self, pages: Pages) -> Addresses:
        """Where each page lies in this process; 0 where it is zero."""
        found = np.zeros(pages.size, np.int64)
        left = np.arange(pages.size)
        for layer in self.layers:
            row = layer.index[pages[left]]
            here = row >= 0
            if row.size and int(row.max()) >= layer.rows:
                raise RefusedError(f"{layer.folder} is damaged: its index names pages that it has not.", "delete it")
            found[left[here]] = layer.address + row[here].astype(np.int64) * PAGE
            left = left[row == INHERITED]
            if not left.size:
                break
        return found

    def used(self) -> Chunks:
        """The chunks outside which every page is zero."""
        found = np.zeros(-(-self.pages // pg.CHUNK), np.bool_)
        whole = self.pages // pg.CHUNK
        for layer in self.layers:
            filled = layer.index >= 0
            found[:whole] |= filled[: whole * pg.CHUNK].reshape(-1, pg.CHUNK).any(axis=1)
            found[whole:] |= filled[whole * pg.CHUNK :].any()
        return found

    def nonzero(self) -> NDArray[np.bool_]:
        """For each page whether it holds anything."""
        filled = np.zeros(self.pages, np.bool_)
        for layer in reversed(self.layers):
            own = layer.index != INHERITED
            filled[own] = layer.index[own] >= 0
        return filled


def differing(one: Sequence[Path], other: Sequence[Path], pages: int) -> Pages:
    """Pages that may differ between two chains: what the layers say that only one of them has. Folders newest first."""
    apart = [f for f in (*one, *other) if (f in one) != (f in other)]
    if not apart:
        return pg.NONE
    if set(one).isdisjoint(other):
        return np.arange(pages)
    changed = np.zeros(pages, np.bool_)
    for folder in apart:
        layer = Layer(folder, pages)
        changed |= layer.index != INHERITED
        layer.close()
    return np.flatnonzero(changed)


class Writer:
    """A layer while it is made. base: it differs from a parent; otherwise what is never stored is zero.

    limit is bytes that the layer may take; RefusedError beyond it."""

    def __init__(self, folder: Path, pages: int, *, base: bool, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self.index = np.full(pages, INHERITED if base else ZERO, np.int32)
        self.rows = 0
        self._fd = _create(folder / RAM)

    def store(self, guest: GuestRam, pages: Pages) -> None:
        """Store these pages as the guest has them now; those stored before are overwritten."""
        buffer = np.empty((_CHUNK, PAGE // 8), np.uint64)
        for at in range(0, pages.size, _CHUNK):
            some = pages[at : at + _CHUNK]
            content = buffer[: some.size]
            guest.read(some, content.ctypes.data + np.arange(some.size, dtype=np.int64) * PAGE)
            self._put(some, content)

    def put(self, pages: Pages, own: Addresses) -> None:
        """Store these pages with the content at `own`; 0 is a page of zeros."""
        buffer = np.empty((_CHUNK, PAGE // 8), np.uint64)
        for at in range(0, pages.size, _CHUNK):
            some, source = pages[at : at + _CHUNK], own[at : at + _CHUNK]
            content = buffer[: some.size]
            content[source == 0] = 0
            filled = np.flatnonzero(source)
            pg.read(content.ctypes.data + filled * PAGE, source[filled])
            self._put(some, content)

    def _put(self, pages: Pages, content: NDArray[np.uint64]) -> None:
        filled = content.any(axis=1)
        row = self.index[pages]
        old = filled & (row >= 0)
        for n in np.flatnonzero(old).tolist():
            ramfile.write(self._fd, content[n].data.cast("B"), int(row[n]) * PAGE)
        new = filled & (row < 0)
        count = int(np.count_nonzero(new))
        if (self.rows + count) * PAGE > self._limit:
            raise RefusedError(
                f"the snapshot would take more than {self._limit} bytes, which is what there is for it.",
                "`hvctl snapshot list` shows what could go, `hvctl config show` the budget",
            )
        if count:
            ramfile.write(self._fd, np.ascontiguousarray(content[new]).data.cast("B"), self.rows * PAGE)
        self.index[pages[~filled]] = ZERO
        self.index[pages[new]] = self.rows + np.arange(count, dtype=np.int32)
        self.rows += count

    def finish(self) -> int:
        """Write the index; the bytes that the layer takes."""
        fd = _create(self._folder / INDEX)
        try:
            ramfile.write(fd, self.index.data.cast("B"), 0)
        finally:
            os.close(fd)
        return self.rows * PAGE

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _create(path: Path) -> int:
    ramfile.wipe(path)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise HvctlError(f"{path} cannot be made: {e.strerror}.", "hvctl doctor") from e


def wipe_unseen(folder: Path, children: Sequence[Path], pages: int) -> None:
    """Give back the pages of a layer that every child has of its own: nobody can reach them any more."""
    layer = Layer(folder, pages)
    try:
        seen = np.zeros(pages, np.bool_)
        for child in children:
            other = Layer(child, pages)
            seen |= other.index == INHERITED
            other.close()
        gone = layer.index[(layer.index >= 0) & ~seen].astype(np.int64)
    finally:
        layer.close()
    fd = os.open(folder / RAM, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for first, count in pg.runs(np.sort(gone)).tolist():
            ramfile.clear(fd, first * PAGE, count * PAGE)
    finally:
        os.close(fd)
