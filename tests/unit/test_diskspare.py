"""The image that takes a disk's place, made by the real qemu-img, and the files and words that it is made of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.disks import diskfiles, diskseat, diskspare
from hvctl.adapters.disks.diskfiles import Files
from hvctl.adapters.disks.diskseat import Seat, Sight
from hvctl.adapters.libvirt.diskxml import disk_driver
from hvctl.adapters.qemu import qemuimg
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.vm import Disk, Process

MIB = 1 << 20
CLUSTER = 65536
XML = """<domain type='qemu'><name>v</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a' index='2'/>
  <target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap'/>
  <source file='/b' index='1'/>{more}
  <backingStore type='file' index='3'><format type='raw'/><source file='/base'/><backingStore/></backingStore>
  <target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
</devices></domain>"""


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def qemu_io(image: Path, *commands: str) -> str:
    argv = ["qemu-io", "-f", "qcow2", *(a for c in commands for a in ("-c", c)), str(image)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert "failed" not in done.stdout, done.stdout
    return done.stdout


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Over a base of ones from 0 to 4 MiB: twos from 1 to 2 MiB at the snapshot "one", threes from 1 to 6 MiB now."""
    folder = tmp_path / "vm"
    folder.mkdir()
    base, image = folder / "base.qcow2", folder / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
    qemu_io(image, "write -P 2 1M 1M")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 3 1M 5M")
    qemu_img("snapshot", "-c", "two", image)
    return image


# --- qemu-img


def test_a_snapshot_that_is_applied(overlay: Path) -> None:
    room = overlay.stat().st_blocks
    qemu_img("snapshot", "-d", "two", overlay)
    qemuimg.apply_internal_snapshot(overlay, "one")
    qemuimg.check(overlay)
    qemu_io(overlay, "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 2M", "read -P 0 4M 4M")
    assert qemuimg.list_internal_snapshots(overlay) == ("one",)
    # What only the later state had is a hole.
    assert overlay.stat().st_blocks < room - 4 * MIB // 512


@pytest.mark.parametrize(
    ("start", "end"), [(1024, 4 * MIB + 512), (0, 8 * MIB), (CLUSTER + 512, CLUSTER + 1024), (8 * MIB - 512, 8 * MIB)]
)
def test_an_extent_that_is_copied(overlay: Path, tmp_path: Path, start: int, end: int) -> None:
    then = overlay.with_name("then.qcow2")
    diskfiles.copy(overlay, then)
    qemuimg.apply_internal_snapshot(then, "one")
    raws = []
    for image in (then, overlay):
        qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "raw")
        raws.append((tmp_path / "raw").read_bytes())
    qemuimg.copy_extent(then, overlay, start, end, [overlay.parent])
    qemuimg.check(overlay)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == raws[1][:start] + raws[0][start:end] + raws[1][end:]
    assert qemuimg.list_internal_snapshots(overlay) == ("one", "two")
    for tag in ("one", "two"):
        qemuimg.apply_internal_snapshot(overlay, tag)
        qemu_io(overlay, "read -P 2 1M 1M" if tag == "one" else "read -P 3 1M 5M")


def test_damage_is_found(overlay: Path) -> None:
    with overlay.open("r+b") as image:
        image.seek(3 * CLUSTER)
        image.write(b"\xff" * CLUSTER)
    with pytest.raises(HvctlError, match="qemu-img failed"):
        qemuimg.check(overlay)


def test_nothing_that_a_header_names_is_opened(overlay: Path, tmp_path: Path) -> None:
    """A QEMU that a guest broke into writes its overlay's header; the copy is worked on by root."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    evil = overlay.with_name("evil.qcow2")
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, evil)
    qemu_img("snapshot", "-c", "one", evil)
    with pytest.raises(RefusedError, match="outside hvctl's folders"):
        qemuimg.copy_extent(evil, overlay, 0, 512, [overlay.parent])
    # These two need no backing image, and get none: it may even be gone.
    secret.unlink()
    qemuimg.apply_internal_snapshot(evil, "one")
    qemuimg.check(evil)
    apart = overlay.with_name("apart.qcow2")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", apart, "1M")
    for work in (qemuimg.check, lambda path: qemuimg.apply_internal_snapshot(path, "one")):
        with pytest.raises(RefusedError, match="keeps its data in another file"):
            work(apart)


# --- files


def test_a_copy_is_sparse_and_ours_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        for offset in (0, 20 * MIB + 4096, 64 * MIB - 4096):
            file.seek(offset)
            file.write(os.urandom(4096))
    target.write_text("what was here before")
    diskfiles.copy(source, target, durable=True)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks
    assert target.stat().st_mode & 0o777 == 0o600
    # A hole at the end stays one, and an empty file is one.
    for size in (MIB, 0):
        with source.open("wb") as file:
            file.truncate(size)
        diskfiles.copy(source, target)
        assert (target.stat().st_size, target.stat().st_blocks) == (size, 0)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="symbolic links"):
        diskfiles.copy(tmp_path / "link", tmp_path / "copy")
    diskfiles.copy(tmp_path / "real", tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()


def test_a_spare_takes_after_its_overlay(tmp_path: Path) -> None:
    overlay, spare = tmp_path / "overlay", tmp_path / "spare"
    for file in (overlay, spare):
        file.write_text("")
    overlay.chmod(0o640)
    os.setxattr(overlay, "user.note", b"kept")
    diskfiles.take_after(overlay, spare)
    assert (spare.stat().st_mode, spare.stat().st_uid) == (overlay.stat().st_mode, overlay.stat().st_uid)
    assert os.getxattr(spare, "user.note") == b"kept"


def test_what_is_only_lent_to_qemu_stays_ours(tmp_path: Path) -> None:
    """It reads the file by its group, and cannot write it whatever the overlay's mode is."""
    files = Files(tmp_path / "disk.qcow2")
    for file in (files.overlay, files.standin, files.backing):
        file.write_text("")
    files.overlay.chmod(0o666)
    os.chown(files.overlay, 64055, 64054)
    os.setxattr(files.overlay, "user.note", b"the overlay's")
    files.lend()
    below, top = files.backing.stat(), files.standin.stat()
    assert (below.st_uid, below.st_gid, below.st_mode & 0o777) == (os.geteuid(), 64054, 0o640)
    assert (top.st_uid, top.st_gid, top.st_mode & 0o777) == (64055, 64054, 0o666)
    assert os.listxattr(files.backing) == []


@pytest.mark.parametrize("killed", [False, True])
def test_the_overlay_from_before_takes_its_place_again(tmp_path: Path, killed: bool) -> None:
    """The path names a whole image at any moment, and the reset stays begun."""
    files = Files(tmp_path / "disk.qcow2")
    files.overlay.write_text("now")
    files.spare.write_text("then")
    files.plan.write_text("")
    files.keep_old()
    files.put_back_old()
    assert files.overlay.read_text() == "now"
    files.spare.replace(files.overlay)
    if killed:
        (tmp_path / "disk.qcow2.again").write_text("left")
    files.put_back_old()
    assert (files.overlay.read_text(), files.spare.read_text()) == ("now", "then")
    assert diskspare.begun(files.overlay)
    files.over(durable=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.qcow2", "disk.qcow2.reset", "disk.qcow2.spare"]


def test_all_files_of_an_overlay_go_and_no_others(tmp_path: Path) -> None:
    overlay = tmp_path / "a[1]*.qcow2"
    files = Files(overlay)
    own = [files.spare, files.plan, files.pristine("one"), files.pristine("two"), files.standin, files.backing]
    own.append(files.pristine("one").with_name(files.pristine("one").name + ".partial"))
    others = [overlay, tmp_path / "a1x.qcow2.one.pristine", tmp_path / "a[1]*.qcow2.bak", Files(tmp_path / "b").spare]
    for file in (*own, *others):
        file.write_text("")
    diskspare.forget(overlay)
    diskspare.forget(overlay)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_nothing_is_forgotten_while_a_reset_is_begun(tmp_path: Path) -> None:
    files = Files(tmp_path / "disk.qcow2")
    for file in (files.overlay, files.plan):
        file.write_text("")
    files.keep_old()
    with pytest.raises(RefusedError, match="was interrupted"):
        diskspare.forget(files.overlay)
    assert files.plan.exists()


@pytest.mark.parametrize("tag", ["../one", "", "a b", "x" * 65])
def test_a_tag_is_no_path(tmp_path: Path, tag: str) -> None:
    with pytest.raises(RefusedError, match="is not the name of a snapshot"):
        Files(tmp_path / "disk").pristine(tag)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tag": "one"}'])
def test_a_note_that_is_none(tmp_path: Path, text: str) -> None:
    files = Files(tmp_path / "disk.qcow2")
    assert diskspare.prepared(files.overlay) is None
    files.plan.write_text(text)
    files.plan.chmod(0o600)
    assert diskspare.prepared(files.overlay) is None


def test_a_note_that_others_can_read_or_that_is_a_link_is_not_taken(tmp_path: Path) -> None:
    files = Files(tmp_path / "disk.qcow2")
    seat = Seat(Process(1, 1, "b"), "vdb", "/d", str(files.overlay), 1, None, (), {}, {}, "", {})
    plan = diskspare.Plan(seat, "one", (0, 512), (1, 2), "q")
    text = diskspare.codec.dump_json(plan).decode()
    files.plan.write_text(text)
    files.plan.chmod(0o644)
    assert diskspare.prepared(files.overlay) is None
    files.plan.chmod(0o600)
    assert diskspare.prepared(files.overlay) == plan
    # One of another disk is not this one's.
    other = Files(tmp_path / "other.qcow2")
    files.plan.rename(other.plan)
    assert diskspare.prepared(other.overlay) is None
    files.plan.symlink_to(other.plan)
    assert diskspare.prepared(files.overlay) is None


# --- where a disk sits


def test_how_libvirt_attached_a_disk() -> None:
    driver = disk_driver(XML.format(more=""), "vdb")
    assert (driver.index, driver.backing_index, driver.discard, driver.io) == (1, 3, "unmap", "native")
    assert driver.unusual == ()
    assert disk_driver(XML.format(more=""), "vda").backing_index is None
    for target in ("sda", "vdz", "vdb' or '1'='1"):
        with pytest.raises(RefusedError, match="has no disk"):
            disk_driver(XML.format(more=""), target)
    assert disk_driver(XML.format(more="<encryption format='luks'/>"), "vdb").unusual == ("encryption",)


def node(name: str, driver: str, **more: Any) -> dict[str, Any]:
    cache = {"direct": True, "no-flush": False, "writeback": True}
    image = {"virtual-size": 8 * MIB, "format": driver, "filename": "/b", "actual-size": 1}
    shown = {"node-name": name, "drv": driver, "file": "/b", "ro": False, "cache": cache, "detect_zeroes": "unmap"}
    return {**shown, "image": image, "encrypted": False, "iops": 0, "write_threshold": 0, **more}


def seen(top: dict[str, Any], *more: dict[str, Any], device: str = "virtio-disk1/virtio-backend") -> Sight:
    nodes = {n["node-name"]: n for n in (top, *more)}
    return Sight("running", {f"/machine/peripheral/{device}": top["node-name"]}, nodes)


DISK = Disk("vdb", None, "/b", "qcow2", True, "virtio-disk1")
NODES = (node("libvirt-1-storage", "file"), node("libvirt-3-storage", "file", file="/base"))


def find(sight: Sight, more: str = "") -> Seat:
    """Of this very process, on whose command line no such node is: as a disk that was plugged."""
    return diskseat.find(sight, Process(os.getpid(), 1, "b"), DISK, XML.format(more=more))


def test_the_nodes_of_a_plugged_disk_can_be_made_again() -> None:
    seat = find(seen(node("libvirt-1-format", "qcow2"), *NODES))
    cache = {"direct": True, "no-flush": False}
    assert seat.storage == {
        "driver": "file",
        "filename": "/b",
        "node-name": "libvirt-1-storage",
        "cache": cache,
        "auto-read-only": True,
        "discard": "unmap",
        "aio": "native",
    }
    assert seat.format == {
        "node-name": "libvirt-1-format",
        "read-only": False,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
        "driver": "qcow2",
        "file": "libvirt-1-storage",
        "backing": "libvirt-3-storage",
    }
    assert (seat.nodes, seat.size) == (("libvirt-1-format", "libvirt-1-storage"), 8 * MIB)
    assert seat.flushes
    # A SCSI disk has its alias for a name, without a path.
    assert find(seen(node("libvirt-1-format", "qcow2"), *NODES, device="virtio-disk1")).device.endswith("/virtio-disk1")


@pytest.mark.parametrize(
    ("top", "others", "more", "match"),
    [
        (node("hvctl-standin-vdb", "qcow2"), NODES, "", "is on its stand-in"),
        (node("libvirt-1-format", "raw"), NODES, "", "is not a writable qcow2"),
        (node("libvirt-1-format", "qcow2", file="/c"), NODES, "", "is not a writable qcow2"),
        (node("libvirt-1-format", "qcow2", ro=True), NODES, "", "is not a writable qcow2"),
        (node("libvirt-1-format", "qcow2", encrypted=True), NODES, "", "is not a writable qcow2"),
        (node("libvirt-1-format", "qcow2", **{"dirty-bitmaps": [{}]}), NODES, "", "dirty bitmap"),
        (node("libvirt-7-format", "qcow2"), NODES, "", "libvirt did not make"),
        (node("libvirt-1-format", "qcow2"), NODES[1:], "", "is not a plain file"),
        (node("libvirt-1-format", "qcow2"), NODES[:1], "", "is not a block node"),
        (node("libvirt-1-format", "qcow2"), NODES, "<encryption format='luks'/>", "cannot make again"),
    ],
)
def test_a_disk_that_cannot_be_made_again(
    top: dict[str, Any], others: tuple[dict[str, Any], ...], more: str, match: str
) -> None:
    with pytest.raises(RefusedError, match=match):
        find(seen(top, *others), more)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RefusedError, match="has no device"):
        find(seen(node("libvirt-1-format", "qcow2"), *NODES, device="virtio-disk10/virtio-backend"))


def test_what_a_look_holds() -> None:
    one = node("libvirt-1-format", "qcow2")
    moved = {"iops": 5, "group": "g", "write_threshold": 9, "image": {**one["image"], "actual-size": 2}}
    assert diskseat.look(one) == diskseat.look({**one, **moved})
    for key in ("ro", "detect_zeroes", "drv"):
        assert diskseat.look(one) != diskseat.look({**one, key: "other"})
    assert diskseat.look(one) != diskseat.look({**one, "cache": {**one["cache"], "no-flush": True}})
