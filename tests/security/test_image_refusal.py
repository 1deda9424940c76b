"""A guest owns the bytes of its disks, and an image may name other files: neither reads a file of the host."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.qemu import qemuimg
from hvctl.errors import RefusedError

MIB = 1 << 20


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_bytes(b"the host's secret".ljust(MIB, b"."))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.mkdir()
    return path


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def test_a_header_that_a_guest_writes_into_a_raw_disk_means_nothing(pool: Path, secret: Path) -> None:
    evil = pool / "evil.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, evil)
    disk = pool / "disk.raw"
    disk.write_bytes(evil.read_bytes().ljust(MIB, b"\0"))
    assert "backing-filename" not in qemuimg.info(disk, "raw")
    overlay = pool / "overlay.qcow2"
    qemuimg.create_overlay(overlay, disk, "raw")
    assert qemuimg.check_chain(overlay, "qcow2", [pool]) == (overlay, disk)
    copy = pool / "copy.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, copy)
    assert copy.read_bytes() == disk.read_bytes()
    assert b"the host's secret" not in copy.read_bytes()


def test_no_call_leaves_the_format_of_an_image_to_be_guessed(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not among the options of an image, it is among those of the command: one for each plain name."""
    calls: list[list[str]] = []
    real = qemuimg.run_tool

    def noted(argv: list[str], **more: Any) -> Any:
        calls.append(argv)
        return real(argv, **more)

    monkeypatch.setattr(qemuimg, "run_tool", noted)
    raw, base, image = pool / "raw", pool / "base.qcow2", pool / "image.qcow2"
    raw.write_bytes(bytes(MIB))
    qemuimg.convert(raw, "raw", base)
    qemuimg.create_overlay(image, base, "qcow2")
    qemuimg.create_empty(pool / "empty.qcow2", MIB)
    assert qemuimg.compare(image, "qcow2", raw, "raw")
    qemuimg.create_internal_snapshot(image, "s")
    qemuimg.apply_internal_snapshot(image, "s")
    qemuimg.extract_internal_snapshot(image, "s", pool / "s.qcow2", [pool])
    qemuimg.copy_extent(base, image, 0, 512, [pool])
    qemuimg.delete_internal_snapshot(image, "s")
    qemuimg.check(image)
    assert {argv[1] for argv in calls} == {"convert", "create", "compare", "snapshot", "info", "check"}
    for argv in calls:
        plain = [word for word in argv if word.startswith("/")]
        assert sum(word in ("-f", "-F", "-O") for word in argv) >= len(plain), argv
        assert all('"driver"' in word for word in argv if word.startswith("json:"))


def test_a_backing_file_outside_is_refused(pool: Path, secret: Path) -> None:
    image = pool / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, image)
    with pytest.raises(RefusedError, match="outside hvctl's folders"):
        qemuimg.check_chain(image, "qcow2", [pool])
    assert qemuimg.check_chain(image, "qcow2", [pool, secret.parent]) == (image, secret)


def test_a_link_that_leads_outside_is_refused(pool: Path, secret: Path) -> None:
    (pool / "inside").symlink_to(secret)
    image = pool / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", pool / "inside", image)
    with pytest.raises(RefusedError, match="outside hvctl's folders"):
        qemuimg.check_chain(image, "qcow2", [pool])


def test_the_second_backing_file_counts_too(pool: Path, secret: Path) -> None:
    middle, image = pool / "middle.qcow2", pool / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, middle)
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", middle, image)
    with pytest.raises(RefusedError, match="outside hvctl's folders"):
        qemuimg.check_chain(image, "qcow2", [pool])


@pytest.mark.parametrize("backing", ["json:{}", "nbd://localhost/x", "relative.qcow2"])
def test_a_backing_name_that_is_no_path_is_refused(pool: Path, backing: str) -> None:
    image = pool / "image.qcow2"
    qemu_img("create", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, image, "1M")
    with pytest.raises(RefusedError, match="not an absolute path"):
        qemuimg.check_chain(image, "qcow2", [pool])


def test_a_backing_file_without_a_format_is_refused(pool: Path) -> None:
    base, image = pool / "base.raw", pool / "image.qcow2"
    base.write_bytes(bytes(MIB))
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base, image)
    # The header extension with the format's name is 0xE2792ACA; 0 there ends the extensions.
    data = image.read_bytes()
    image.write_bytes(data.replace(bytes.fromhex("e2792aca"), bytes(4), 1))
    with pytest.raises(RefusedError, match="does not say what format"):
        qemuimg.check_chain(image, "qcow2", [pool])


def test_a_data_file_is_refused_before_anything_opens_it(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pool / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", image, "1M")

    def opened(*arguments: object, **_: object) -> None:
        pytest.fail(f"{arguments} was run")

    monkeypatch.setattr(qemuimg, "run_tool", opened)
    with pytest.raises(RefusedError, match="keeps its data in another file"):
        qemuimg.info(image, "qcow2")


def test_a_loop_of_backing_files_ends(pool: Path) -> None:
    one, two = pool / "one.qcow2", pool / "two.qcow2"
    qemu_img("create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", two, one, "1M")
    qemu_img("create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", one, two, "1M")
    with pytest.raises(RefusedError, match="loop"):
        qemuimg.check_chain(one, "qcow2", [pool])


def test_other_formats_and_broken_images_are_refused(pool: Path) -> None:
    path = pool / "image"
    path.write_bytes(b"KDMV" + bytes(MIB))
    for format in ("vmdk", "auto", ""):
        with pytest.raises(RefusedError):
            qemuimg.info(path, format)
    with pytest.raises(RefusedError, match="not a qcow2"):
        qemuimg.info(path, "qcow2")
