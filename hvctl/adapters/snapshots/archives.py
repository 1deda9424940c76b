"""Saved snapshots on a disk of the host: ports.Archives for the local file system.

What is saved of a snapshot never changes while the snapshot is there, so its guest may run meanwhile: the layers of its
RAM, the image with its device state, and what its tags hold in the overlays.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from hvctl.adapters.disks.diskfiles import copy
from hvctl.adapters.kernel import hostmemory
from hvctl.adapters.qemu import blockgraph, qcow2, qemuimg
from hvctl.adapters.ram import ramstream
from hvctl.adapters.ram.layers import Writer
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import archivefolder as af
from hvctl.adapters.snapshots import snapshotfolder, snapshotlayers
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.archive import FORMAT, Archive, Backing, Hardware, Room, Saved, SavedDisk, SavedFile
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Snapshot
from hvctl.settings import Settings

# Tables and headers of images, rounded up.
_SLACK: Final = 4 << 20


class LocalArchives:
    def __init__(self, settings: Settings, facts: HostFacts) -> None:
        self._settings = settings
        self._root = settings.snapshots_dir
        self._owner = (facts.qemu_uid, facts.qemu_gid)

    # --- saving

    def room(self, snapshot: Snapshot, folder: str) -> Room:
        parent = af.free_place(Path(folder))
        need = self._held(snapshot) + self._state_of(snapshot).lstat().st_blocks * 512 + _SLACK
        for path in _overlays(snapshot).values():
            with qcow2.opened(path) as image:
                need += qcow2.allocated(image, snapshot.tag) + _SLACK
        return Room(str(parent), need, _free(parent))

    def write(self, vm_name: str, snapshot: Snapshot, hardware: Hardware, folder: str) -> Saved:
        part = af.make(Path(folder), snapshot.id)
        try:
            with _host_errors(folder):
                return self._write(vm_name, snapshot, hardware, part)
        except BaseException:
            af.remove(part)
            raise

    def _write(self, vm_name: str, snapshot: Snapshot, hardware: Hardware, part: Path) -> Saved:
        pages, ram = self._write_ram(snapshot, part)
        state = self._write_state(snapshot, part)
        disks, files = [], []
        for target, path in _overlays(snapshot).items():
            disk = self._write_disk(snapshot, target, path, part)
            disks.append(disk)
            files.append(af.saved_file(part / disk.file))
        archive = Archive(
            format=FORMAT,
            saved_at=datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            vm_name=vm_name,
            snapshot=snapshot,
            hardware=hardware,
            pages=pages,
            room=(part / af.STATE).lstat().st_blocks * 512,
            disks=tuple(disks),
            files=(ram, state, *files),
        )
        af.write_manifest(part, archive)
        return Saved(pages * PAGE, ram.size, state.size, sum(f.size for f in files))

    def _write_ram(self, snapshot: Snapshot, part: Path) -> tuple[int, SavedFile]:
        count = snapshot.ram_size // PAGE
        out = af.Hashed(part / af.RAM)
        try:
            with snapshotlayers.chain(self._root, snapshot.vm_uuid, snapshot.id, count) as chain:
                pages = ramstream.write(chain, out)
            return pages, out.close(durable=True)
        finally:
            out.close()

    def _write_state(self, snapshot: Snapshot, part: Path) -> SavedFile:
        copy(self._state_of(snapshot), part / af.STATE)
        qemuimg.check(part / af.STATE)
        if snapshot.tag not in qemuimg.list_internal_snapshots(part / af.STATE):
            raise RefusedError(
                f"snapshot {snapshot.name} is damaged: its device state is not there.",
                "take a new one: hvctl snapshot take",
            )
        return af.saved_file(part / af.STATE)

    def _write_disk(self, snapshot: Snapshot, target: str, overlay: Path, part: Path) -> SavedDisk:
        """The tag's state alone, as the image's active one, and held under the tag again: whoever loads it can go back
        to it at once."""
        file = part / af.disk_name(target)
        folders = [self._settings.images_dir, *_folders(snapshot)]
        backing = self.backing(str(overlay))
        qemuimg.extract_internal_snapshot(overlay, snapshot.tag, file, folders)
        qemuimg.create_internal_snapshot(file, snapshot.tag)
        qemuimg.check(file)
        size = int(qemuimg.info(file, "qcow2")["virtual-size"])
        return SavedDisk(target, file.name, str(overlay), size, backing)

    def publish(self, snapshot: Snapshot, folder: str) -> None:
        with _host_errors(folder):
            af.publish(Path(folder), snapshot.id)

    def drop(self, snapshot: Snapshot, folder: str) -> None:
        af.remove(af.partial(Path(folder), snapshot.id))

    def published(self, snapshot: Snapshot, folder: str) -> bool:
        return af.published(Path(folder), snapshot.id)

    # --- loading

    def read(self, folder: str) -> Archive:
        with _host_errors(folder):
            return af.read(Path(folder))

    def backing(self, overlay: str) -> Backing | None:
        said = qemuimg.info(Path(overlay), "qcow2")
        name, format = said.get("backing-filename"), said.get("backing-filename-format")
        if name is None:
            return None
        if format is None or not name.startswith("/"):
            raise RefusedError(f"the image {overlay} does not name its backing file in full.")
        try:
            status = Path(name).stat()
        except OSError as e:
            raise RefusedError(f"the image {name} below {overlay} cannot be read: {e.strerror}.") from e
        return Backing(name, format, status.st_size, status.st_mtime_ns)

    def load_rooms(self, archive: Archive) -> tuple[Room, ...]:
        held = archive.pages * PAGE
        need = held + archive.room + self._settings.memory_margin
        rooms = [
            Room(str(self._root), need, snapshotlayers.free(self._root, self._settings.snapshot_budget)),
            # The guest's own RAM comes beside the snapshot's.
            Room("the host's memory", held + need, hostmemory.available()),
        ]
        sizes = {f.name: f.size for f in archive.files}
        disks = Counter[Path]()
        for disk in archive.disks:
            disks[Path(disk.overlay).parent] += sizes[disk.file] + _SLACK
        return (*rooms, *(Room(str(folder), size, _free(folder)) for folder, size in disks.items()))

    def import_snapshot(self, snapshot: Snapshot, folder: str) -> int:
        place = snapshotfolder.folder_of(self._root, snapshot)
        snapshotfolder.make(self._root, place)
        try:
            with _host_errors(str(place)):
                return self._import(snapshot, Path(folder), place)
        except BaseException:
            snapshotfolder.remove(place)
            raise

    def remove_import(self, snapshot: Snapshot) -> None:
        place = snapshotfolder.folder_of(self._root, snapshot)
        snapshotfolder.unpublish(place)
        snapshotfolder.remove(place)
        snapshotfolder.remove_vm_folder(self._root, snapshot.vm_uuid)

    def _import(self, snapshot: Snapshot, folder: Path, place: Path) -> int:
        count = snapshot.ram_size // PAGE
        limit = snapshotlayers.free(self._root, self._settings.snapshot_budget) - self._settings.memory_margin
        writer = Writer(place, count, base=False, limit=limit)
        try:
            with af.opened(folder / af.RAM) as fd, os.fdopen(os.dup(fd), "rb") as source:
                for numbers, addresses in ramstream.read(source, count):
                    writer.put(numbers, addresses)
            stored = writer.finish()
        finally:
            writer.close()
        image = place / snapshotfolder.VMSTATE
        copy(folder / af.STATE, image)
        os.chown(image, *self._owner, follow_symlinks=False)
        return stored

    # --- how

    def _held(self, snapshot: Snapshot) -> int:
        """Bytes of RAM that hold anything: what it takes at most, however well it can be compressed."""
        count = snapshot.ram_size // PAGE
        with snapshotlayers.chain(self._root, snapshot.vm_uuid, snapshot.id, count) as chain:
            return int(np.count_nonzero(chain.nonzero())) * PAGE

    def _state_of(self, snapshot: Snapshot) -> Path:
        return snapshotfolder.folder_of(self._root, snapshot) / snapshotfolder.VMSTATE


def _overlays(snapshot: Snapshot) -> dict[str, Path]:
    """The image of each writable disk, by target."""
    found = {}
    for target, node in sorted(snapshot.targets.items()):
        paths = blockgraph.overlays(snapshot.binding.blocks, (node,))
        if not paths:
            raise RefusedError(f"snapshot {snapshot.name} does not say where disk {target} is.", "take a new one")
        found[target] = Path(paths[0])
    return found


def _folders(snapshot: Snapshot) -> list[Path]:
    """Where the images are that its QEMU had open when it was taken."""
    facts = map(shlex.split, snapshot.binding.blocks)
    return sorted({Path(f[4]).parent for f in facts if f[0] == "node" and f[4].startswith("/")})


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@contextmanager
def _host_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise HvctlError(f"the saved snapshot {folder}: {e.strerror}.", f"df -h {Path(folder).parent}") from e
