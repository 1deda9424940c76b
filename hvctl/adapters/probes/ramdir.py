"""The folder of guest RAM and snapshots: on tmpfs, sparse, reached by QEMU, and the one that libvirt uses."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hvctl.adapters.node.hostpaths import HOST, HostPaths
from hvctl.adapters.node.qemuconf import setting
from hvctl.model.finding import Finding, degraded, failing, ok
from hvctl.settings import Settings
from hvctl.units import format_size

NAME = "ram-directory"
PREPARE = "hvctl host prepare --yes"
WARM = "warm resets of VMs that start now"
SPARSE_SIZE = 1 << 30


def probe(settings: Settings, paths: HostPaths = HOST) -> Finding:
    folder = settings.guests_ram_dir
    if not folder.is_dir():
        return failing(
            NAME, f"{folder} is not a folder", "starting VMs with RAM that can be reset", PREPARE, fixable=True
        )
    kind = filesystem(folder, paths)
    if kind != "tmpfs":
        remedy = f"mount -t tmpfs -o mode=0711 tmpfs {settings.ram_dir}"
        return failing(
            NAME, f"{folder} is on {kind}, not on tmpfs", "warm resets: guest RAM would be on a disk", remedy
        )
    if closed := _closed_to_others(folder):
        return failing(NAME, f"QEMU's user cannot pass {closed}", "starting VMs", f"chmod o+x {closed}", fixable=True)
    if fault := _not_sparse(folder):
        return failing(
            NAME, fault, "warm resets and memory overcommit", f"mount -o remount,size=90% {settings.ram_dir}"
        )
    configured = setting(paths.qemu_conf, "memory_backing_dir")
    if configured is None or Path(configured) != folder:
        detail = f"libvirt puts guest RAM in {configured or 'its default folder'}, not in {folder}"
        return degraded(NAME, detail, WARM, PREPARE, fixable=True)
    free = os.statvfs(folder)
    return ok(NAME, f"{folder} is on tmpfs, {format_size(free.f_bavail * free.f_frsize)} free")


def filesystem(folder: Path, paths: HostPaths = HOST) -> str:
    """The type of the file system that holds a folder, from the mount table."""
    target = folder.resolve()
    best, kind = -1, "unknown"
    for line in (paths.proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        # The last mount on the same point hides those before it.
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def _closed_to_others(folder: Path) -> Path | None:
    """The first folder on the way that QEMU's own user cannot pass through."""
    for part in (*reversed(folder.parents), folder):
        if not part.stat().st_mode & 0o001:
            return part
    return None


def _not_sparse(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            os.ftruncate(stream.fileno(), SPARSE_SIZE)
            os.pwrite(stream.fileno(), b"\1", SPARSE_SIZE // 2)
            if os.lseek(stream.fileno(), 0, os.SEEK_DATA) == 0:
                return f"{folder} does not tell holes from data"
            if os.fstat(stream.fileno()).st_blocks * 512 > SPARSE_SIZE // 16:
                return f"a sparse file in {folder} takes its whole size"
    except OSError as e:
        return f"a file of {format_size(SPARSE_SIZE)} cannot be made in {folder}: {e.strerror}"
    return None
