"""Saved snapshots on files of this machine: what is saved comes back, and what is not whole is not taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import archivefolder, archives, snapshotfolder
from hvctl.adapters.snapshots.archives import LocalArchives
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.archive import Archive
from unit.archivelab import FACTS, HARDWARE, MIB, PAGES, ArchiveLab, io, lay


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ArchiveLab:
    """Saved once, and never changed by a test."""
    lab = lay(tmp_path_factory.mktemp("lab"))
    save(lab)
    return lab


@pytest.fixture
def lab(tmp_path: Path) -> ArchiveLab:
    return lay(tmp_path)


@pytest.fixture
def copy(made: ArchiveLab, tmp_path: Path) -> Path:
    """A copy of the saved snapshot to spoil."""
    shutil.copytree(made.target, tmp_path / "copy")
    return tmp_path / "copy"


def save(lab: ArchiveLab) -> Archive:
    lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    lab.archives.publish(lab.snapshot, str(lab.target))
    return lab.archives.read(str(lab.target))


def ram_of(folder: Path) -> dict[int, bytes]:
    with Chain([folder], PAGES) as chain:
        filled = np.flatnonzero(chain.nonzero())
        content = np.empty((filled.size, PAGE), np.uint8)
        pg.read(content.ctypes.data + np.arange(filled.size, dtype=np.int64) * PAGE, chain.locate(filled))
        return {int(n): page.tobytes() for n, page in zip(filled, content, strict=True)}


def test_what_is_saved_says_what_it_is_and_is_the_owners_alone(made: ArchiveLab) -> None:
    archive = made.archives.read(str(made.target))
    assert (archive.vm_name, archive.snapshot, archive.hardware) == ("a", made.snapshot, HARDWARE)
    assert archive.pages == len(made.ram)
    assert stat.S_IMODE(made.target.stat().st_mode) == 0o700
    files = {f.name: f for f in made.target.iterdir()}
    assert {stat.S_IMODE(f.stat().st_mode) for f in files.values()} == {0o600}
    assert set(files) == {"manifest.json", "ram.zst", "state.qcow2", "disk-vda.qcow2", "disk-vdb.qcow2"}
    for file in archive.files:
        assert hashlib.sha256(files[file.name].read_bytes()).hexdigest() == file.sha256
    assert list(made.target.parent.glob(".*")) == []
    assert made.archives.published(made.snapshot, str(made.target))


def test_the_disks_are_those_of_the_snapshot_and_hold_it(made: ArchiveLab, tmp_path: Path) -> None:
    archive = made.archives.read(str(made.target))
    for disk, overlay in zip(archive.disks, (made.overlay, made.data), strict=True):
        saved = made.target / disk.file
        then = tmp_path / disk.file
        shutil.copy(overlay, then)
        qemuimg.apply_internal_snapshot(then, made.snapshot.tag)
        assert qemuimg.compare(saved, "qcow2", then, "qcow2")
        assert not qemuimg.compare(saved, "qcow2", overlay, "qcow2")
        assert qemuimg.list_internal_snapshots(saved) == (made.snapshot.tag,)
        assert qemuimg.backing_file(saved) == qemuimg.backing_file(overlay)
        # Thin: the image below is not in it.
        assert saved.stat().st_size < 2 * MIB
    assert archive.disks[0].backing is not None
    assert archive.disks[1].backing is None


def test_ram_and_state_come_back(made: ArchiveLab, tmp_path: Path) -> None:
    """In folders of another host, as after a restart that took the tmpfs away."""
    fresh = replace(made.settings, ram_dir=str(tmp_path / "ram"))
    archived = LocalArchives(fresh, FACTS)
    snapshot = replace(made.snapshot, folder=str(fresh.snapshots_dir / made.snapshot.vm_uuid / made.snapshot.id))
    for _ in range(2):
        assert archived.import_snapshot(snapshot, str(made.target)) == len(made.ram) * PAGE
    folder = Path(snapshot.folder)
    assert ram_of(folder) == made.ram
    assert (folder / snapshotfolder.VMSTATE).read_bytes() == (made.target / "state.qcow2").read_bytes()
    assert list(snapshotfolder.published(fresh.snapshots_dir, None)) == []
    snapshotfolder.publish(folder, snapshot)
    assert list(snapshotfolder.published(fresh.snapshots_dir, None)) == [snapshot]


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("name", ["ram.zst", "state.qcow2", "disk-vda.qcow2", "manifest.json"])
@pytest.mark.parametrize("spoil", [_cut, _flip, _grow, _link, _pipe, Path.unlink, lambda p: p.chmod(0o640)])
def test_a_file_that_is_not_as_it_was_saved_is_refused(
    made: ArchiveLab, copy: Path, name: str, spoil: Callable[[Path], Any]
) -> None:
    path = copy / name
    if name == "manifest.json":
        path.write_text(path.read_text().strip())
    spoil(path)
    with pytest.raises(RefusedError):
        made.archives.read(str(copy))


def test_files_that_changed_places_are_refused(made: ArchiveLab, copy: Path) -> None:
    one, other = copy / "disk-vda.qcow2", copy / "disk-vdb.qcow2"
    one.rename(copy / "x")
    other.rename(one)
    (copy / "x").rename(other)
    with pytest.raises(RefusedError, match="disk-vda"):
        made.archives.read(str(copy))


def _rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Somebody edits the manifest and makes its digest right again."""
    whole = json.loads((folder / "manifest.json").read_text())
    archive = json.loads(whole["archive"])
    change(archive)
    text = json.dumps(archive)
    (folder / "manifest.json").write_text(
        json.dumps({"archive": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a["files"].pop(), id="a file less"),
        pytest.param(lambda a: a["files"].append({**a["files"][0], "name": "../../etc/passwd"}), id="a way out"),
        pytest.param(lambda a: a["disks"][0].update(file="/etc/passwd"), id="a disk elsewhere"),
        pytest.param(lambda a: a["disks"].pop(), id="a disk less"),
        pytest.param(lambda a: a.pop("hardware"), id="no hardware"),
        pytest.param(lambda a: a.update(format=2), id="another format"),
        pytest.param(lambda a: a.pop("format"), id="no format"),
    ],
)
def test_a_manifest_of_something_else_is_refused(
    made: ArchiveLab, copy: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    _rewritten(copy, change)
    with pytest.raises(RefusedError):
        made.archives.read(str(copy))


def test_a_folder_that_others_may_enter_is_refused(made: ArchiveLab, copy: Path) -> None:
    copy.chmod(0o750)
    with pytest.raises(RefusedError, match="user alone"):
        made.archives.read(str(copy))
    copy.chmod(0o700)
    link = copy.with_name("link")
    link.symlink_to(copy)
    with pytest.raises(RefusedError):
        made.archives.read(str(link))
    assert made.archives.read(str(copy)).snapshot == made.snapshot


def test_what_is_not_there_is_not_found(made: ArchiveLab, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        made.archives.read(str(tmp_path / "none"))
    assert not made.archives.published(made.snapshot, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(RefusedError, match=r"manifest\.json is not there"):
        made.archives.read(str(tmp_path / "empty"))


def test_the_room_is_an_upper_bound(lab: ArchiveLab) -> None:
    room = lab.archives.room(lab.snapshot, str(lab.target))
    save(lab)
    taken = sum(f.stat().st_blocks * 512 for f in lab.target.iterdir())
    assert taken <= room.need
    assert room.where == str(lab.target.parent)
    assert room.free > room.need
    need = {r.where: r.need for r in lab.archives.load_rooms(lab.archives.read(str(lab.target)))}
    assert need[str(lab.settings.snapshots_dir)] >= len(lab.ram) * PAGE
    disks = sum(f.stat().st_size for f in lab.target.glob("disk-*"))
    assert need[str(lab.overlay.parent)] >= disks


@pytest.mark.parametrize("spoiled", ["state", "tag", "ram", "disk"])
def test_what_cannot_be_saved_leaves_nothing(lab: ArchiveLab, spoiled: str) -> None:
    place = Path(lab.snapshot.folder)
    match spoiled:
        case "state":
            qemuimg.delete_internal_snapshot(place / snapshotfolder.VMSTATE, lab.snapshot.tag)
        case "tag":
            qemuimg.delete_internal_snapshot(lab.data, lab.snapshot.tag)
        case "ram":
            (place / "ram").unlink()
        case "disk":
            lab.overlay.unlink()
    with pytest.raises(HvctlError):
        lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    assert sorted(p.name for p in lab.target.parent.iterdir()) == ["ram", "state"]


def test_a_full_disk_leaves_nothing(lab: ArchiveLab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.ramstream, "write", full)
    with pytest.raises(HvctlError, match="No space left") as failed:
        lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    assert failed.value.hint == f"df -h {lab.target.parent}"
    assert sorted(p.name for p in lab.target.parent.iterdir()) == ["ram", "state"]


def test_what_is_not_published_is_dropped_and_nothing_else(lab: ArchiveLab) -> None:
    archive = save(lab)
    other = replace(lab.snapshot, id="another")
    with pytest.raises(RefusedError, match="there already"):
        lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    part = archivefolder.make(lab.target.with_name("second"), lab.snapshot.id)
    (part / "ram.zst").write_text("half")
    lab.archives.drop(other, str(lab.target.with_name("second")))
    assert part.exists()
    for _ in range(2):
        lab.archives.drop(lab.snapshot, str(lab.target.with_name("second")))
    assert not part.exists()
    lab.archives.publish(lab.snapshot, str(lab.target))
    assert lab.archives.read(str(lab.target)) == archive
    assert not lab.archives.published(other, str(lab.target))


def test_nothing_is_saved_where_others_could_change_it(lab: ArchiveLab) -> None:
    lab.target.parent.chmod(0o777)
    for act in (
        lambda: lab.archives.room(lab.snapshot, str(lab.target)),
        lambda: lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target)),
    ):
        with pytest.raises(RefusedError, match="only this user"):
            act()
    lab.target.parent.chmod(0o1777)
    assert lab.archives.room(lab.snapshot, str(lab.target)).need


def test_an_import_that_fails_leaves_nothing(made: ArchiveLab, copy: Path, tmp_path: Path) -> None:
    fresh = replace(made.settings, ram_dir=str(tmp_path / "ram"))
    snapshot = replace(made.snapshot, folder=str(fresh.snapshots_dir / made.snapshot.vm_uuid / made.snapshot.id))
    _cut(copy / "ram.zst")
    os.truncate(copy / "ram.zst", (copy / "ram.zst").stat().st_size // 2)
    with pytest.raises(RefusedError):
        LocalArchives(fresh, FACTS).import_snapshot(snapshot, str(copy))
    assert not Path(snapshot.folder).exists()
    small = replace(fresh, snapshot_budget=len(made.ram) * PAGE // 2)
    with pytest.raises(RefusedError, match="take more than"):
        LocalArchives(small, FACTS).import_snapshot(snapshot, str(made.target))
    assert not Path(snapshot.folder).exists()


def test_an_image_below_that_changed_is_another_one(lab: ArchiveLab) -> None:
    before = lab.archives.backing(str(lab.overlay))
    assert before is not None
    io(Path(before.path), "write -P 7 0 64k")
    assert lab.archives.backing(str(lab.overlay)) != before
    assert lab.archives.backing(str(lab.data)) is None


def test_an_image_outside_is_not_read(lab: ArchiveLab, tmp_path: Path) -> None:
    """A QEMU that its guest took over may write any name into its overlay."""
    secret = tmp_path / "elsewhere" / "secret.qcow2"
    secret.parent.mkdir()
    qemuimg.create_empty(secret, 16 * MIB)
    subprocess.run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", str(secret), str(lab.overlay)], check=True)
    with pytest.raises(RefusedError, match="outside"):
        lab.archives.write("a", lab.snapshot, HARDWARE, str(lab.target))
    assert not lab.target.exists()
