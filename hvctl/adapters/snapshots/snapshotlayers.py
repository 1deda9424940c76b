"""The layers of a VM's snapshots as a tree: which builds on which, how two differ, and what room is left for more."""

from __future__ import annotations

import os
from pathlib import Path

from hvctl.adapters.ram import layers
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.pages import Pages
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.errors import RefusedError


def lineage(root: Path, uuid: str, identity: str) -> list[Path]:
    """The folders of a snapshot's layer and those it builds on, newest first. RefusedError if one is not there."""
    folder = snapshotfolder.vm_folder(root, uuid)
    parents = {s.id: s.parent for s in snapshotfolder.published(root, uuid)}
    found: list[Path] = []
    step: str | None = identity
    while step is not None:
        if step not in parents or len(found) > len(parents):
            raise RefusedError(
                f"what snapshot {identity} builds on is not there: it is damaged.",
                "take a new one: hvctl snapshot take",
            )
        found.append(folder / step)
        step = parents[step]
    return found


def chain(root: Path, uuid: str, identity: str, pages: int) -> Chain:
    return Chain(lineage(root, uuid, identity), pages)


def apart(root: Path, uuid: str, one: str, other: str, pages: int) -> Pages:
    """Pages in which the RAM of two snapshots may differ; all if the first is not there any more, as after a delete
    that was killed."""
    if one == other:
        return pg.NONE
    mine = lineage(root, uuid, other)
    try:
        return layers.differing(lineage(root, uuid, one), mine, pages)
    except RefusedError:
        return pg.span(0, pages)


def free(root: Path, budget: int | None) -> int:
    """Bytes that snapshots may still take of their tmpfs; budget is what all of this host may take."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    left = status.f_bavail * status.f_frsize
    return left if budget is None else min(left, budget - _stored(root))


def _stored(root: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in root.glob("*/*/*")) if root.exists() else 0
