"""Saved snapshots of a fake host: files of its state, as its disks are."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hvctl import codec
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import File, Part, World
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.archive import FORMAT, Archive, Backing, Hardware, Room, Saved, SavedDisk, SavedFile
from hvctl.model.snapshot import Snapshot

RAM, STATE, MANIFEST = "ram.zst", "state.qcow2", "manifest.json"


class FakeArchives:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def room(self, snapshot: Snapshot, folder: str) -> Room:
        with self._file.call("archive_room", snapshot.vm_uuid, looks=True) as world:
            if _exists(world, folder):
                raise RefusedError(f"{folder} is there already.", "name a folder that is not there yet")
            return Room(str(Path(folder).parent), len(_file(world, f"{snapshot.folder}/ram").part.text), world.room)

    def write(self, vm_name: str, snapshot: Snapshot, hardware: Hardware, folder: str) -> Saved:
        part = _partial(snapshot, folder)
        with self._file.call("write_archive", snapshot.vm_uuid) as world:
            if _exists(world, folder):
                raise RefusedError(f"{folder} is there already.")
            world.files[f"{part}/{RAM}"] = _copy(_file(world, f"{snapshot.folder}/ram"))
        # A second change, so that a death in between leaves half of it.
        with self._file.change() as world:
            world.files[f"{part}/{STATE}"] = _copy(_file(world, f"{snapshot.folder}/state"))
            disks = []
            for disk in world.vms[snapshot.vm_uuid].disks:
                if disk.target in snapshot.targets and disk.path:
                    saved = SavedDisk(disk.target, f"disk-{disk.target}.qcow2", disk.path, 0, None)
                    state = _file(world, disk.path).tags[snapshot.tag]
                    held = {snapshot.tag: Part(state.text, state.moment)}
                    world.files[f"{part}/{saved.file}"] = File(Part(state.text, state.moment), held)
                    disks.append(saved)
            names = [RAM, STATE, *(d.file for d in disks)]
            files = tuple(_saved(n, _file(world, f"{part}/{n}")) for n in names)
            ram = files[0].size
            archive = Archive(FORMAT, f"moment {world.clock}", vm_name, snapshot, hardware, ram, 0, tuple(disks), files)
            world.files[f"{part}/{MANIFEST}"] = File(Part(codec.dump_json(archive).decode()))
            return Saved(ram, ram, files[1].size, sum(f.size for f in files[2:]))

    def publish(self, snapshot: Snapshot, folder: str) -> None:
        part = _partial(snapshot, folder)
        with self._file.call("publish_archive", snapshot.vm_uuid) as world:
            mine = {p: f for p, f in world.files.items() if p.startswith(f"{part}/")}
            for path, file in mine.items():
                del world.files[path]
                world.files[folder + path.removeprefix(part)] = file

    def drop(self, snapshot: Snapshot, folder: str) -> None:
        part = _partial(snapshot, folder)
        with self._file.call("drop_archive", snapshot.vm_uuid) as world:
            world.files = {p: f for p, f in world.files.items() if not p.startswith(f"{part}/")}

    def published(self, snapshot: Snapshot, folder: str) -> bool:
        with self._file.call("archive_published", snapshot.vm_uuid, looks=True) as world:
            return _exists(world, folder)

    def read(self, folder: str) -> Archive:
        with self._file.call("read_archive", looks=True) as world:
            if not _exists(world, folder):
                raise NotFoundError(f"there is no saved snapshot at {folder}.", "hvctl snapshot save makes one")
            try:
                archive = codec.load_json(Archive, world.files[f"{folder}/{MANIFEST}"].part.text)
            except HvctlError as e:
                raise _damaged(folder, e.message) from e
            for file in archive.files:
                if _saved(file.name, world.files.get(f"{folder}/{file.name}", File())) != file:
                    raise _damaged(folder, f"{file.name} is another one.")
            return archive

    def backing(self, overlay: str) -> Backing | None:
        with self._file.call("backing", looks=True) as world:
            _file(world, overlay)
            return None

    def load_rooms(self, archive: Archive) -> tuple[Room, ...]:
        with self._file.call("load_rooms", looks=True) as world:
            return (Room("the tmpfs of snapshots", archive.pages, world.room),)

    def import_snapshot(self, snapshot: Snapshot, folder: str) -> int:
        with self._file.call("import_snapshot", snapshot.vm_uuid) as world:
            world.files[f"{snapshot.folder}/ram"] = _copy(_file(world, f"{folder}/{RAM}"))
        with self._file.change() as world:
            world.files[f"{snapshot.folder}/state"] = _copy(_file(world, f"{folder}/{STATE}"))
            return len(_file(world, f"{folder}/{RAM}").part.text) // 2

    def remove_import(self, snapshot: Snapshot) -> None:
        with self._file.call("remove_import", snapshot.vm_uuid) as world:
            world.files = {p: f for p, f in world.files.items() if not p.startswith(f"{snapshot.folder}/")}


def _damaged(folder: str, how: str) -> RefusedError:
    return RefusedError(f"the saved snapshot {folder} is damaged: {how}", "it cannot be loaded; use another one")


def _partial(snapshot: Snapshot, folder: str) -> str:
    return f"{folder}.{snapshot.id}.partial"


def _exists(world: World, folder: str) -> bool:
    return f"{folder}/{MANIFEST}" in world.files


def _file(world: World, path: str) -> File:
    if path not in world.files:
        raise HvctlError(f"the file {path} is not there.")
    return world.files[path]


def _copy(file: File) -> File:
    tags = {name: Part(part.text, part.moment) for name, part in file.tags.items()}
    return File(Part(file.part.text, file.part.moment), tags)


def _saved(name: str, file: File) -> SavedFile:
    return SavedFile(name, len(file.part.text), hashlib.sha256(file.part.text.encode()).hexdigest())
