"""What the image of a disk takes of its file system, and what it would take after a reset, from its metadata alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hvctl.adapters.qemu import qcow2
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.vm import Disk, Space


def space(disk: Disk, tag: str | None) -> Space:
    """NotFoundError: there is no image; RefusedError: it is no file. The QEMU that has it open writes on meanwhile."""
    if disk.path is None:
        raise NotFoundError(f"disk {disk.target} has no image on this host.")
    path = Path(disk.path)
    try:
        status = path.stat(follow_symlinks=False)
        system = os.statvfs(path)
    except FileNotFoundError as e:
        raise NotFoundError(f"the image {path} is not there.") from e
    except OSError as e:
        raise HvctlError(f"the image {path} cannot be looked at: {e.strerror}.") from e
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(f"the image {path} is no file.")
    taken, left = status.st_blocks * 512, system.f_bavail * system.f_frsize
    if disk.format != "qcow2":
        return Space(taken, left, status.st_size)
    with qcow2.opened(path) as image:
        known = tag is not None and any(s.name == tag for s in image.snapshots)
        return Space(taken, left, image.size, qcow2.allocated(image, tag) if known and tag else None)
