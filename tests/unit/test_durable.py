"""What is acknowledged is there after a power failure: bytes reach the disk before their name does, and names with the
folder that they are in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.disks import diskplace
from hvctl.adapters.disks.storage import FolderStorage
from hvctl.model.archive import Placement
from hvctl.model.host import HostFacts
from hvctl.model.vm import Accel, DiskSpec, VmSpec
from hvctl.settings import Settings
from unit.archivelab import HARDWARE, lay

MIB = 1 << 20
UUID = "6e0a1f0e-5c1b-4b7e-9b52-0d3b3b1f8a01"


class Disk:
    """The calls that decide what a power failure leaves, in their order: a file or a folder was synced, something got a
    name, or a second one, or lost its name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []

    def note(self, what: str, path: Any) -> None:
        self.calls.append((what, Path(path)))

    def lost(self) -> set[Path]:
        """Names, come or gone, that a power failure now would undo."""
        calls = self.calls
        return {p for n, (what, p) in enumerate(calls) if what != "sync" and ("sync", p.parent) not in calls[n:]}

    def empty(self) -> set[Path]:
        """Files that had a name before their bytes were on the disk."""
        synced: set[Path] = set()
        found: set[Path] = set()
        for what, path in self.calls:
            if what == "sync":
                synced.add(path)
            elif what == "name" and path.is_file() and path not in synced:
                found.add(path)
        return found

    def at(self, what: str, path: Path) -> int:
        return self.calls.index((what, path))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Every call does what it always does."""
    seen = Disk()

    def noted(name: str, note: Callable[..., None]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            answer = real(*arguments, **more)
            note(*arguments)
            return answer

        monkeypatch.setattr(os, name, call)

    def renamed(old: Any, new: Any) -> None:
        if ("sync", Path(old)) in seen.calls:
            seen.note("sync", new)
        seen.note("name", new)

    noted("fsync", lambda fd: seen.note("sync", Path(f"/proc/self/fd/{fd}").readlink()))
    for name in ("rename", "replace"):
        noted(name, renamed)
    noted("mkdir", lambda path, *_: seen.note("name", path))
    noted("link", lambda _, path: seen.note("link", path))
    noted("unlink", lambda path: seen.note("gone", path))
    return seen


def test_a_file_that_is_replaced(disk: Disk, tmp_path: Path) -> None:
    replace_file(tmp_path / "f", "new")
    assert (disk.empty(), disk.lost()) == (set(), set())
    assert disk.at("sync", tmp_path / "f") < disk.at("name", tmp_path / "f") < disk.at("sync", tmp_path)


def test_the_disks_of_a_new_vm(disk: Disk, tmp_path: Path) -> None:
    made = Settings(state_dir=str(tmp_path / "state"))
    made.vms_dir.mkdir(parents=True)
    disk.calls.clear()
    folder = made.vms_dir / UUID
    spec = VmSpec(
        uuid=UUID, name="a", image="micro", accel=Accel.TCG, vcpus=1, max_vcpus=1, memory=MIB, max_memory=MIB,
        kernel="/k/kernel", initrd="/k/initrd", cmdline="", folder=str(folder),
        monitor=str(folder / "qmp" / "monitor.sock"), disks=(DiskSpec("data", "vda", str(folder / "data.qcow2"), MIB),),
        nics=(),
    )  # fmt: skip
    FolderStorage(made, HostFacts("h", "", 1, 1, "", "", "", 2, os.geteuid(), os.getegid())).make_disks(spec)
    assert folder / "data.qcow2" in {p for what, p in disk.calls if what == "name"}
    assert (disk.empty(), disk.lost()) == (set(), set())


def test_a_saved_snapshot(disk: Disk, tmp_path: Path) -> None:
    lab = lay(tmp_path)
    disk.calls.clear()
    lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    lab.archives.publish(lab.snapshot, str(lab.target))
    part = lab.target.with_name(f".{lab.target.name}.{lab.snapshot.id}.partial")
    named = disk.at("name", lab.target)
    before = {p.name for what, p in disk.calls[:named] if what == "sync" and p.parent == part}
    assert {f.name for f in lab.target.iterdir()} <= before, "its files"
    assert disk.at("sync", part) < named, "and their names, before its own"
    assert lab.target not in disk.lost()


def test_disks_that_a_load_puts_in_place(disk: Disk, tmp_path: Path) -> None:
    overlay, saved, note = tmp_path / "root.qcow2", tmp_path / "saved", tmp_path / "load.json"
    overlay.write_text("old")
    saved.write_text("saved")
    disk.calls.clear()
    diskplace.place(note, "0123abcd", [Placement(str(saved), str(overlay))])
    assert (disk.empty(), disk.lost()) == (set(), set())
    kept = disk.calls[disk.at("name", note) :].index(("sync", tmp_path)) + disk.at("name", note)
    assert kept < disk.at("name", overlay), "the note says what is kept before anything is replaced"
    diskplace.take_back(note, "0123abcd", [str(overlay)])
    assert (overlay.read_text(), disk.lost()) == ("old", set())
    gone = disk.at("gone", note)
    assert ("sync", tmp_path) in disk.calls[gone:]
