"""Tags in real images whose snapshots are gone: which they are, what they hold, and what is left when they go."""

from __future__ import annotations

import resource
import struct
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.adapters.qemu import qcow2, qemuimg
from hvctl.adapters.snapshots import straytags
from hvctl.adapters.snapshots.opened import Opened
from hvctl.model.allocation import Allocation
from hvctl.model.snapshot import StrayTag
from hvctl.model.vm import Disk, State, Vm
from hvctl.settings import Settings
from unit.archivelab import MIB, io
from unit.vms import vm_with

CLUSTER = 64 << 10
TAGS = [f"hvctl-{uuid.uuid5(uuid.NAMESPACE_DNS, n)}" for n in ("one", "two", "three")]


def tag(image: Path, name: str) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", name, str(image)], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Cluster 0 is of the first tag alone, 1 of the first two, 2 of all and of now, 3 of the second alone."""
    made = tmp_path / "data.qcow2"
    qemuimg.create_empty(made, 4 * MIB)
    io(made, f"write -P 1 0 {3 * CLUSTER}")
    tag(made, TAGS[0])
    io(made, f"write -P 2 0 {CLUSTER}", f"write -P 2 {3 * CLUSTER} {CLUSTER}")
    tag(made, "somebody")
    io(made, f"write -P 3 0 {CLUSTER}")
    tag(made, TAGS[1])
    io(made, f"write -P 4 0 {2 * CLUSTER}", f"write -P 4 {3 * CLUSTER} {CLUSTER}")
    return made


@pytest.fixture
def vm(image: Path) -> Vm:
    off = replace(vm_with(Allocation(1, 256 * MIB)), state=State.OFF, process=None)
    raw = Disk("vdb", "raw", str(image.with_suffix(".raw")), "raw", True)
    return replace(off, disks=(Disk("vda", "data", str(image), "qcow2", True), raw))


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(Settings(state_dir=str(tmp_path), run_dir=str(tmp_path), ram_dir=str(tmp_path)))


def test_what_a_tag_holds_alone(image: Path) -> None:
    with qcow2.opened(image) as found:
        assert qcow2.held_alone(found) == {TAGS[0]: CLUSTER, "somebody": CLUSTER, TAGS[1]: CLUSTER}


@pytest.mark.parametrize(("at", "value"), [(36, (1 << 32) - 1), (60, 65536), (60, 257)])
def test_what_a_hostile_image_says_takes_no_memory(
    image: Path, vm: Vm, opened: Opened, tmp_path: Path, at: int, value: int
) -> None:
    """A first table of 32 GiB in a file that is as long, or very many snapshots: such a disk is left out."""
    with image.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(">I", value))
        file.truncate(1 << 36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert straytags.stray(tmp_path, opened, vm) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_stray_tags_go_and_no_other(image: Path, vm: Vm, opened: Opened, tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    (root / vm.uuid / TAGS[1].removeprefix("hvctl-")).mkdir(parents=True)
    assert straytags.stray(root, opened, vm) == [StrayTag(TAGS[0], CLUSTER)]
    now = tmp_path / "now.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(now)], check=True)
    before = image.stat().st_blocks
    assert straytags.drop(root, opened, vm, frozenset(TAGS)) == [StrayTag(TAGS[0], CLUSTER)]
    assert qemuimg.list_internal_snapshots(image) == ("somebody", TAGS[1])
    assert straytags.stray(root, opened, vm) == []
    assert straytags.drop(root, opened, vm, frozenset(TAGS)) == []
    assert before - image.stat().st_blocks >= CLUSTER // 512
    assert qemuimg.compare(image, "qcow2", now, "raw")


def test_what_cannot_be_seen_is_not_stray(image: Path, vm: Vm, opened: Opened, tmp_path: Path) -> None:
    """A running VM whose QEMU does not answer, and a file that is none."""
    running = replace(vm, state=State.RUNNING)
    assert straytags.stray(tmp_path, opened, running) == []
    image.write_bytes(b"noise")
    assert straytags.stray(tmp_path, opened, vm) == []
