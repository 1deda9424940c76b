"""Where two internal snapshots of one qcow2 image differ, and what one of them holds alone, read from its tables
without opening it as an image.

The layout is QEMU's docs/interop/qcow2.txt. What belongs to a snapshot is written before the snapshot is, and never
changes while it is there (but for the flag "copied", which is left out), so a QEMU may have the image open meanwhile.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hvctl.errors import HvctlError, RefusedError

Entries = NDArray[np.uint64]
_MAGIC: Final = 0x514649FB
_EXTERNAL_DATA: Final = 1 << 2
_EXTENDED_L2: Final = 1 << 4
_OFFSET: Final = np.uint64(0x00FFFFFFFFFFFE00)
_COPIED: Final = np.uint64(1 << 63)
_COMPRESSED: Final = np.uint64(1 << 62)
_ZERO: Final = np.uint64(1)
_HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQ")
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_MOST_SNAPSHOTS: Final = 65536
_MOST_READ: Final = 32 << 20  # QEMU's own limit of a first table
_MOST_TABLES: Final = 4096  # 2 TiB that were written, of clusters of 64 KiB
_MOST_HELD: Final = 256
_MOST_PLACES: Final = 32 << 20  # of all snapshots together: 256 MiB


@dataclass(frozen=True, slots=True)
class Tagged:
    """One internal snapshot: size is that of the disk in bytes."""

    name: str
    size: int
    l1_offset: int
    l1_size: int


class Image:
    """An opened image; see `opened`."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        header = _HEADER.unpack(self._read(0, _HEADER.size))
        magic, version, self._backing, _, bits, self.size, _, l1_size, l1_offset, _, _, count, at, features = header
        if magic != _MAGIC:
            raise RefusedError(f"{path} is not a qcow2 image.")
        if version < 3:
            features = 0
        if features & (_EXTERNAL_DATA | _EXTENDED_L2) or not 9 <= bits <= 21 or count > _MOST_SNAPSHOTS:
            raise RefusedError(f"{path} is a qcow2 image of a kind that hvctl cannot compare.")
        self.cluster: int = 1 << bits
        self.snapshots = tuple(self._snapshots(at, count))
        self._now = Tagged("", self.size, l1_offset, l1_size)

    def places(self, name: str | None) -> Entries:
        """Where the clusters of a snapshot are in the file (None: of the disk as it is now), sorted, and 0; compressed
        ones are left out. What it takes does not grow with the disk's size, which whoever wrote the file made up."""
        tagged = self._now if name is None else self._tagged(name)
        tables = np.unique(self._words(tagged.l1_offset, tagged.l1_size) & _OFFSET)
        if tables.size > _MOST_TABLES:
            raise RefusedError(f"the image {self._path} has too many tables to be looked at.")
        each = self.cluster // 8
        found = [self._words(offset, each) for offset in tables.tolist() if offset]
        entries = np.concatenate([*found, np.zeros(1, np.uint64)])
        return np.unique(entries[~_is(entries, _COMPRESSED)] & _OFFSET)

    def clusters(self, name: str) -> Entries:
        """For each cluster of the disk its entry: 0 is as in the image below, 1 is zeros, others name their place. The
        clusters of an image that has none below it are zeros where nothing was written."""
        tagged = self._tagged(name)
        tables = self._words(tagged.l1_offset, tagged.l1_size) & _OFFSET
        each = self.cluster // 8
        count = -(-tagged.size // self.cluster)
        entries = np.zeros(max(-(-count // each), 1) * each, np.uint64)
        for n, offset in enumerate(tables[: -(-count // each)].tolist()):
            if offset:
                entries[n * each : (n + 1) * each] = self._words(offset, each)
        entries = entries[:count] & ~_COPIED
        zero = (entries & _ZERO).astype(bool) & ~_is(entries, _COMPRESSED)
        if not self._backing:
            zero |= entries == 0
        entries[zero] = _ZERO
        return entries

    def _tagged(self, name: str) -> Tagged:
        tagged = next((s for s in self.snapshots if s.name == name), None)
        if tagged is None:
            raise RefusedError(f"{self._path} does not hold the snapshot {name}.", "hvctl snapshot list")
        return tagged

    def same(self, one: int, other: int) -> bool:
        """Whether two different entries have the same content. One that cannot be told without the image below, or
        without unpacking, counts as another."""
        if any(entry == 0 or entry & int(_COMPRESSED) for entry in (one, other)):
            return False
        return self._content(one) == self._content(other)

    def _content(self, entry: int) -> bytes:
        if entry == int(_ZERO):
            return bytes(self.cluster)
        # The file may end before the last cluster does.
        raw = os.pread(self._fd, self.cluster, entry & int(_OFFSET))
        return raw + bytes(self.cluster - len(raw))

    def _snapshots(self, at: int, count: int) -> Iterator[Tagged]:
        for _ in range(count):
            l1_offset, l1_size, id_length, name_length, _, _, _, _, extra = _SNAPSHOT.unpack(self._read(at, 40))
            more = self._read(at + 40, extra)
            size = struct.unpack_from(">Q", more, 8)[0] if extra >= 16 else self.size
            name = self._read(at + 40 + extra + id_length, name_length).decode(errors="replace")
            yield Tagged(name, size, l1_offset, l1_size)
            at += -(-(40 + extra + id_length + name_length) // 8) * 8

    def _words(self, offset: int, count: int) -> Entries:
        return np.frombuffer(self._read(offset, count * 8), ">u8").astype(np.uint64)

    def _read(self, offset: int, length: int) -> bytes:
        if length > _MOST_READ:
            raise RefusedError(f"the image {self._path} has a table of {length} bytes.")
        raw = os.pread(self._fd, length, offset)
        if len(raw) != length:
            raise RefusedError(f"the image {self._path} is damaged: it ends at {offset + len(raw)}.")
        return raw


def _is(entries: Entries, flag: np.uint64) -> NDArray[np.bool_]:
    return np.asarray(entries & flag, np.bool_)


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """An image for reading. RefusedError: it is not a plain qcow2 file; HvctlError: it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise HvctlError(f"the image {path} cannot be opened: {e.strerror}.") from e
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RefusedError(f"{path} is not a file.")
        yield Image(fd, path)
    finally:
        os.close(fd)


def differing(image: Image, one: str, other: str) -> NDArray[np.int64]:
    """The clusters in which two snapshots of the image differ, by number, sorted."""
    a, b = image.clusters(one), image.clusters(other)
    both = min(a.size, b.size)
    found = np.flatnonzero(a[:both] != b[:both])
    keep = [n for n in found.tolist() if not image.same(int(a[n]), int(b[n]))]
    # A disk that was made larger differs where only one of them has anything.
    return np.concatenate((np.array(keep, np.int64), np.arange(both, max(a.size, b.size))))


def allocated(image: Image, name: str) -> int:
    """Bytes that the snapshot's own clusters take."""
    return int(np.count_nonzero(image.clusters(name) > _ZERO)) * image.cluster


def held_alone(image: Image) -> dict[str, int]:
    """Of each snapshot the bytes of clusters that neither the disk as it is now nor another one has. Of an image that a
    QEMU has open about so many: where its disk is now may be newer in QEMU than in the file. RefusedError of an image
    with more than a guest of hvctl ever has."""
    places: dict[str, Entries] = {}
    for tagged in image.snapshots:
        places[tagged.name] = image.places(tagged.name)
        if len(image.snapshots) > _MOST_HELD or sum(p.size for p in places.values()) > _MOST_PLACES:
            raise RefusedError("the image has too many snapshots to be looked at.")
    every, times = np.unique(np.concatenate([image.places(None), *places.values()]), return_counts=True)
    once = every[times == 1]
    return {name: int(np.intersect1d(own, once).size) * image.cluster for name, own in places.items()}
