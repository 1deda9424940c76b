"""Guest images: what goes into them, when one is built, and that only whole ones are ever seen."""

from __future__ import annotations

import fcntl
import lzma
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from hvctl.adapters import tools
from hvctl.adapters.disks.storage import FolderStorage
from hvctl.adapters.images import imagebuild, imageinitramfs, imagepackages, imagestore
from hvctl.adapters.images.imagepackages import Package
from hvctl.adapters.images.imagereseed import reseed_program
from hvctl.adapters.qemu import qemuimg
from hvctl.errors import BusyError, DeadlineError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.host import HostFacts
from hvctl.model.vm import Accel, DiskSpec, VmSpec
from hvctl.settings import Settings

MIB = 1 << 20
FACTS = HostFacts("h", "qemu:///system", 2, 1 << 30, "7.2", "9.0", "boot", 1, os.getuid(), os.getgid())
VM = "6f0d2a52-6f3c-4a51-9d3f-5d9a3f6c1a11"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=str(tmp_path / "state"))


class FakeArchive:
    """Stands for apt: fixed packages, whose files are just enough for the micro recipe."""

    versions = {"busybox-static": "1", "linux-image-6.1-cloud-amd64": "6.1"}
    sources, codename = "", "bookworm"
    unpacked = 0

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True)

    def closure(self, wanted: Iterable[str]) -> tuple[Package, ...]:
        return tuple(Package(name, version) for name, version in sorted(self.versions.items()))

    def unpack(self, packages: Iterable[Package], work: Path, into: Path) -> None:
        type(self).unpacked += 1
        modules = into / "lib/modules/6.1"
        for folder in ("bin", "sbin", "usr/sbin", "boot"):
            (into / folder).mkdir(parents=True)
        modules.mkdir(parents=True)
        for name in ("bin/busybox", "sbin/mke2fs", "usr/sbin/qemu-ga"):
            (into / name).write_text("#!/bin/sh\necho sh\n")
            (into / name).chmod(0o755)
        (into / "boot/vmlinuz-6.1").write_bytes(b"kernel")
        for name in imagebuild.load_recipe("micro").modules:
            (modules / f"{name}.ko").write_bytes(b"\0depends=\0")


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> type[FakeArchive]:
    class Fresh(FakeArchive):
        pass

    monkeypatch.setattr(imagebuild, "Archive", Fresh)
    monkeypatch.setattr(imagepackages, "architecture", lambda: "amd64")
    return Fresh


def build(settings: Settings, **options: bool) -> imagestore.Image:
    return imagebuild.build(settings, "micro", lambda _: None, **options)


def test_an_image_is_built_once_and_found(settings: Settings, archive: type[FakeArchive]) -> None:
    assert imagebuild.cached(settings, "micro") is None
    assert not Path(settings.state_dir).exists()
    image = build(settings)
    assert build(settings) == image == imagestore.find(settings, "micro") == imagebuild.cached(settings, "micro")
    assert archive.unpacked == 1
    assert Path(image.kernel).read_bytes() == b"kernel"
    assert [d.size for d in image.disks] == [64 * MIB]
    folder = Path(image.kernel).parent
    assert folder.name == f"micro-{image.digest[:12]}"
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {0o444}
    assert [p.name for p in settings.images_dir.iterdir() if p != folder] == [".lock"]
    build(settings, force=True)
    assert archive.unpacked == 2


def test_qemu_may_pass_to_an_image_whatever_the_umask(settings: Settings, archive: type[FakeArchive]) -> None:
    before = os.umask(0o077)
    try:
        build(settings)
    finally:
        os.umask(before)
    assert stat.S_IMODE(settings.images_dir.stat().st_mode) == 0o755


def test_a_new_package_version_is_a_new_image(settings: Settings, archive: type[FakeArchive]) -> None:
    old = build(settings)
    archive.versions = {**archive.versions, "busybox-static": "2"}
    new = build(settings)
    assert old.digest != new.digest
    assert {i.digest for i in imagestore.list_images(settings)} == {old.digest, new.digest}


def test_a_changed_script_is_a_new_image(
    settings: Settings, archive: type[FakeArchive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(settings)
    recipes = tmp_path / "recipes"
    shutil.copytree(imagebuild.recipes_folder(), recipes)
    monkeypatch.setattr(imagebuild, "recipes_folder", lambda: recipes)
    assert imagebuild.cached(settings, "micro") == old
    with (recipes / "guest/usr/libexec/hvctl-boot").open("a") as script:
        script.write("# changed\n")
    assert imagebuild.cached(settings, "micro") is None


def test_a_failed_build_leaves_nothing(
    settings: Settings, archive: type[FakeArchive], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise HvctlError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(imageinitramfs, "write_cpio", fail)
        with pytest.raises(HvctlError, match="disk is full"):
            build(settings)
    assert imagestore.list_images(settings) == ()
    assert [p.name for p in settings.images_dir.iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_not_an_image_and_goes(settings: Settings, archive: type[FakeArchive]) -> None:
    image = build(settings)
    left = settings.images_dir / ".build-micro"
    shutil.copytree(Path(image.kernel).parent, left)
    torn = settings.images_dir / "micro-torn"
    shutil.copytree(left, torn)
    (torn / "kernel").unlink()
    (settings.images_dir / "micro-junk").mkdir()
    (settings.images_dir / "micro-junk" / "image.json").write_text('{"name": "micro"')
    assert imagestore.list_images(settings) == (image,)
    build(settings)
    assert not left.exists()


def test_two_builds_at_once_are_refused(settings: Settings, archive: type[FakeArchive]) -> None:
    settings.images_dir.mkdir(parents=True)
    with (settings.images_dir / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            build(settings)
    build(settings)


def test_unknown_names_say_what_helps(settings: Settings) -> None:
    with pytest.raises(NotFoundError) as image:
        imagestore.find(settings, "micro")
    assert image.value.hint == "build it: hvctl image build micro"
    with pytest.raises(NotFoundError) as image:
        imagestore.find(settings, "mcro")
    assert image.value.hint == "hvctl image build knows debian, micro"
    with pytest.raises(NotFoundError) as recipe:
        imagebuild.load_recipe("../micro")
    assert recipe.value.hint == "recipes: debian, micro"
    with pytest.raises(NotFoundError):
        imagestore.delete(settings, "micro")


def spec_of(settings: Settings, image: imagestore.Image | None, *disks: DiskSpec) -> VmSpec:
    folder = settings.vms_dir / VM
    boot = image.kernel if image else "/elsewhere/kernel"
    return VmSpec(
        uuid=VM,
        name="a",
        image="micro",
        accel=Accel.TCG,
        vcpus=1,
        max_vcpus=1,
        memory=128 * MIB,
        max_memory=128 * MIB,
        kernel=boot,
        initrd=boot,
        cmdline="",
        folder=str(folder),
        monitor=str(folder / "qmp" / "monitor.sock"),
        disks=disks,
    )


def disk(settings: Settings, size: int = MIB, backing: Path | None = None) -> DiskSpec:
    path = settings.vms_dir / VM / "data.qcow2"
    return DiskSpec("data", "vda", str(path), size, str(backing) if backing else None, "raw" if backing else None)


def test_an_image_that_a_vm_boots_from_stays(settings: Settings, archive: type[FakeArchive]) -> None:
    image = build(settings)
    storage = FolderStorage(settings, FACTS)
    storage.make_disks(spec_of(settings, image))
    for attempt in (lambda: imagestore.delete(settings, "micro"), lambda: build(settings, force=True)):
        with pytest.raises(RefusedError, match=VM):
            attempt()
    assert imagestore.find(settings, "micro") == image
    storage.remove(VM)
    assert imagestore.delete(settings, "micro") == (image,)
    assert imagestore.list_images(settings) == ()
    assert [p.name for p in settings.images_dir.iterdir()] == [".lock"]


def test_an_image_under_an_overlay_stays(settings: Settings, archive: type[FakeArchive]) -> None:
    image = build(settings)
    base = Path(image.kernel)
    storage = FolderStorage(settings, FACTS)
    storage.make_disks(spec_of(settings, None, disk(settings, backing=base)))
    with pytest.raises(RefusedError, match="disk over"):
        imagestore.delete(settings, "micro")
    storage.remove(VM)
    imagestore.delete(settings, "micro")


def test_disks_are_private_thin_and_kept(settings: Settings) -> None:
    storage = FolderStorage(settings, FACTS)
    asked = spec_of(settings, None, disk(settings))
    storage.make_disks(asked)
    made = Path(asked.disks[0].path)
    folder = made.parent
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert [stat.S_IMODE(p.stat().st_mode) for p in (folder.parent, folder, folder / "qmp")] == [0o711, 0o711, 0o700]
    assert qemuimg.info(made, "qcow2")["virtual-size"] == MIB
    before = made.stat()
    storage.make_disks(asked)
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(RefusedError, match="another disk"):
        storage.make_disks(spec_of(settings, None, disk(settings, size=2 * MIB)))
    assert made.stat().st_ino == before.st_ino
    assert storage.folders() == (VM,)
    storage.remove(VM)
    storage.remove(VM)
    assert storage.folders() == ()


def test_half_a_disk_is_made_again(settings: Settings) -> None:
    storage = FolderStorage(settings, FACTS)
    asked = spec_of(settings, None, disk(settings))
    path = Path(asked.disks[0].path)
    path.parent.mkdir(parents=True)
    (path.parent / f".{path.name}.partial").write_bytes(b"half")
    storage.make_disks(asked)
    assert [p.name for p in sorted(path.parent.iterdir())] == ["data.qcow2", "qmp"]


def test_internal_snapshots_are_listed_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a,b=c.qcow2"
    qemuimg.create_empty(path, MIB)
    for name in ("one", "two"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, str(path)], check=True)
    assert qemuimg.list_internal_snapshots(path) == ("one", "two")
    qemuimg.delete_internal_snapshot(path, "one")
    qemuimg.delete_internal_snapshot(path, "one")
    assert qemuimg.list_internal_snapshots(path) == ("two",)
    with pytest.raises(FileExistsError):
        qemuimg.create_empty(path, MIB)


def test_compare_sees_one_byte(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(bytes(MIB))
    b.write_bytes(bytes(MIB - 1) + b"\1")
    qemuimg.convert(a, "raw", c)
    assert qemuimg.compare(a, "raw", c, "qcow2")
    assert not qemuimg.compare(b, "raw", c, "qcow2")


def read_cpio(data: bytes) -> list[tuple[str, list[int], bytes]]:
    """An independent reader of the newc form: name, the 13 header fields, contents."""
    found, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_end = at + 110 + fields[11]
        name = data[at + 110 : name_end - 1].decode()
        start = name_end + -name_end % 4
        at = start + fields[6] + -fields[6] % 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return found
        found.append((name, fields, data[start : start + fields[6]]))


def test_the_cpio_archive_is_what_the_kernel_reads(tmp_path: Path) -> None:
    entries = {
        "b/c/odd": imageinitramfs.file(b"12345", executable=False),
        "init": imageinitramfs.file(b"#!/bin/sh\n", executable=True),
        "bin": imageinitramfs.link("usr/bin"),
    }
    one, two = tmp_path / "1", tmp_path / "2"
    imageinitramfs.write_cpio(entries, one, 1735689600)
    imageinitramfs.write_cpio(dict(reversed(entries.items())), two, 1735689600)
    assert one.read_bytes() == two.read_bytes()
    read = read_cpio(one.read_bytes())
    assert [(name, oct(fields[1]), data) for name, fields, data in read] == [
        ("b", "0o40755", b""),
        ("b/c", "0o40755", b""),
        ("b/c/odd", "0o100644", b"12345"),
        ("bin", "0o120777", b"usr/bin"),
        ("init", "0o100755", b"#!/bin/sh\n"),
    ]
    assert all(fields[2:4] == [0, 0] and fields[5] == 1735689600 for _, fields, _ in read)
    assert len({fields[0] for _, fields, _ in read}) == len(read)


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    needs = {"virtio": "virtio_ring", "virtio_ring": "", "virtio-rng": "virtio,virtio_ring", "other": ""}
    for name, depends in needs.items():
        (tmp_path / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0")
    order = imageinitramfs.module_order(tmp_path, ["virtio_rng"])
    assert list(order) == ["virtio_ring.ko", "virtio.ko", "virtio-rng.ko"]
    with pytest.raises(HvctlError, match="no module nothing"):
        imageinitramfs.module_order(tmp_path, ["nothing"])
    (tmp_path / "packed.ko.zst").touch()
    with pytest.raises(HvctlError, match="compressed"):
        imageinitramfs.module_order(tmp_path, ["packed"])


def test_a_kernel_with_packed_modules_and_some_built_in(tmp_path: Path) -> None:
    content = b"\x7fELF\0depends=virtio-ring,net_failover\0"
    (tmp_path / "virtio_net.ko.xz").write_bytes(lzma.compress(content))
    (tmp_path / "net_failover.ko.xz").write_bytes(lzma.compress(b"\0depends=\0"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_ring.ko\nkernel/fs/ext4/ext4.ko\n")
    order = imageinitramfs.module_order(tmp_path, ["ext4", "virtio-ring", "virtio_net"])
    assert order == {"net_failover.ko": b"\0depends=\0", "virtio_net.ko": content}
    assert list(order) == ["net_failover.ko", "virtio_net.ko"]


def test_every_script_of_a_guest_is_sound() -> None:
    recipes = imagebuild.recipes_folder()
    scripts = [p for tree in ("guest", "initramfs") for p in (recipes / tree).rglob("*") if p.is_file()]
    programs = [p for p in scripts if p.read_bytes().startswith(b"#!")]
    assert len(programs) >= 8
    for program in programs:
        assert program.read_text().startswith("#!/bin/busybox sh\n"), program
        subprocess.run(["sh", "-n", str(program)], check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
@pytest.mark.parametrize(("given", "works"), [(0, False), (31, False), (32, True), (64, True), (5000, True)])
def test_reseed_wants_enough_bytes_and_the_right(tmp_path: Path, given: int, works: bool) -> None:
    program = tmp_path / "reseed"
    program.write_bytes(reseed_program())
    program.chmod(0o700)
    done = subprocess.run([program], input=os.urandom(given), capture_output=True, check=False)
    # Only root may credit entropy: for everybody else the ioctl fails, which must show.
    assert done.returncode == (0 if works and os.geteuid() == 0 else 1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the right up")
def test_reseed_fails_without_the_right_to_credit(tmp_path: Path) -> None:
    program = tmp_path / "reseed"
    program.write_bytes(reseed_program())
    program.chmod(0o755)
    argv = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", str(program)]
    assert subprocess.run(argv, input=os.urandom(64), capture_output=True, check=False).returncode == 1


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnreachableError) as missing:
        tools.run_tool(["qemu-img", "--version"])
    assert missing.value.hint == "install it: apt-get install qemu-utils"


def test_a_failing_tool_says_its_last_words() -> None:
    with pytest.raises(HvctlError, match="sh failed with status 3: no space left"):
        tools.run_tool(["sh", "-c", "echo first >&2; echo 'no space left' >&2; exit 3"])
    with pytest.raises(DeadlineError):
        tools.run_tool(["sleep", "60"], seconds=0.05)
