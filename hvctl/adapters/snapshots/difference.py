"""Where two snapshots of one VM differ: pages of guest RAM by content, clusters of its disks by their tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from hvctl.adapters.qemu import blockgraph, qcow2
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.pages import PAGE, Pages
from hvctl.adapters.snapshots import snapshotlayers
from hvctl.errors import RefusedError
from hvctl.model.archive import Difference, DiskDifference, RegionDifference
from hvctl.model.snapshot import Range, Snapshot

_CHUNK: Final = 1024  # pages


def difference(root: Path, one: Snapshot, other: Snapshot) -> Difference:
    """RefusedError: they are not of the same memory or disks, or one is damaged."""
    if [(r.name, r.size) for r in one.regions] != [(r.name, r.size) for r in other.regions]:
        raise RefusedError(f"{one.name} and {other.name} are not of the same memory.", "hvctl snapshot show")
    pages = _pages(root, one, other)
    return Difference(tuple(_regions(one, pages)), tuple(_disks(one, other)))


def _pages(root: Path, one: Snapshot, other: Snapshot) -> Pages:
    count = one.ram_size // PAGE
    candidates = snapshotlayers.apart(root, one.vm_uuid, one.id, other.id, count)
    with (
        snapshotlayers.chain(root, one.vm_uuid, one.id, count) as a,
        snapshotlayers.chain(root, one.vm_uuid, other.id, count) as b,
    ):
        return unequal(a, b, candidates)


def unequal(one: Chain, other: Chain, candidates: Pages) -> Pages:
    """Those of the pages that do not have the same content in both."""
    now, then = np.empty((_CHUNK, PAGE // 8), np.uint64), np.empty((_CHUNK, PAGE // 8), np.uint64)
    found = [pg.NONE]
    for at in range(0, candidates.size, _CHUNK):
        some = candidates[at : at + _CHUNK]
        a, b = one.locate(some), other.locate(some)
        # A page that no layer stores is zero, and a stored one is not.
        apart = (a == 0) != (b == 0)
        both = np.flatnonzero((a != b) & ~apart)
        if both.size:
            row = np.arange(both.size, dtype=np.int64) * PAGE
            pg.read(now.ctypes.data + row, a[both])
            pg.read(then.ctypes.data + row, b[both])
            apart[both] = (now[: both.size] != then[: both.size]).any(axis=1)
        found.append(some[apart])
    return np.concatenate(found)


def _regions(snapshot: Snapshot, pages: Pages) -> Iterator[RegionDifference]:
    first = 0
    for region in snapshot.regions:
        last = first + region.size // PAGE
        low, high = np.searchsorted(pages, (first, last))
        own = pages[low:high] - first
        yield RegionDifference(region.name, own.size * PAGE, _ranges(own, PAGE))
        first = last


def _disks(one: Snapshot, other: Snapshot) -> Iterator[DiskDifference]:
    for target, node in sorted(one.targets.items()):
        paths = [blockgraph.overlays(s.binding.blocks, (s.targets.get(target, ""),)) for s in (one, other)]
        if not paths[0] or paths[0] != paths[1]:
            raise RefusedError(f"{one.name} and {other.name} do not have disk {target} ({node}) in the same image.")
        with qcow2.opened(Path(paths[0][0])) as image:
            clusters = qcow2.differing(image, one.tag, other.tag)
            yield DiskDifference(target, image.cluster, clusters.size * image.cluster, _ranges(clusters, image.cluster))


def _ranges(numbers: Pages, unit: int) -> tuple[Range, ...]:
    return tuple(Range(first * unit, (first + count) * unit) for first, count in pg.runs(numbers).tolist())
