"""What differs between two internal snapshots of an image, beside what their guests would read."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvctl.adapters.qemu import qcow2, qemuimg
from hvctl.errors import HvctlError, RefusedError
from unit.archivelab import MIB, io

SIZE = 4 * MIB + 1536  # the last cluster is not a whole one
CLUSTER = 64 << 10
CLUSTERS = -(-SIZE // CLUSTER)

starts = st.integers(0, SIZE // 512 - 1)
lengths = st.integers(1, 4 * CLUSTER // 512)
actions = st.tuples(
    st.sampled_from(["write -P 1", "write -P 2", "write -P 0", "write -z", "write -z -u", "discard"]), starts, lengths
)
phases = st.lists(actions, max_size=4)


def _act(image: Path, some: Sequence[tuple[str, int, int]]) -> None:
    words = [f"{what} {start * 512} {min(length, SIZE // 512 - start) * 512}" for what, start, length in some]
    if words:
        io(image, *words)


def _tag(image: Path, name: str) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", name, str(image)], check=True)


def _seen(image: Path, name: str, to: Path) -> np.ndarray:
    """What the guest of a snapshot reads, a row for each cluster."""
    argv = ["qemu-img", "convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw"]
    subprocess.run([*argv, str(image), str(to)], check=True)
    content = to.read_bytes()
    return np.frombuffer(content + bytes(CLUSTERS * CLUSTER - len(content)), np.uint8).reshape(CLUSTERS, CLUSTER)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(phases, phases, phases, st.booleans())
def test_every_cluster_that_differs_is_found(
    tmp_path: Path, before: list, between: list, after: list, based: bool
) -> None:
    image = tmp_path / "image.qcow2"
    image.unlink(missing_ok=True)
    base = tmp_path / "base.qcow2"
    if based:
        base.unlink(missing_ok=True)
        qemuimg.create_empty(base, SIZE)
        io(base, "write -P 1 0 2M")
        qemuimg.create_overlay(image, base, "qcow2")
    else:
        qemuimg.create_empty(image, SIZE)
    for name, phase in (("a", before), ("b", between), ("c", after)):
        _act(image, phase)
        _tag(image, name)
    with qcow2.opened(image) as opened:
        assert opened.cluster == CLUSTER
        found = qcow2.differing(opened, "a", "b").tolist()
        assert qcow2.differing(opened, "b", "a").tolist() == found
        assert qcow2.differing(opened, "a", "a").tolist() == []
        one, other = opened.clusters("a"), opened.clusters("b")
    a, b = (_seen(image, name, tmp_path / name) for name in "ab")
    wanted = np.flatnonzero((a != b).any(axis=1)).tolist()
    assert set(wanted) <= set(found)
    # What only one of them took over from the image below counts as another one, and nothing else does.
    assert all(0 in (one[n], other[n]) for n in set(found) - set(wanted))
    assert based or found == wanted


def test_what_a_snapshot_takes_is_told(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemuimg.create_empty(image, SIZE)
    _tag(image, "empty")
    io(image, "write -P 1 1M 1M", "write -z 2M 1M")
    _tag(image, "full")
    with qcow2.opened(image) as opened:
        assert [s.name for s in opened.snapshots] == ["empty", "full"]
        assert (qcow2.allocated(opened, "empty"), qcow2.allocated(opened, "full")) == (0, MIB)
        with pytest.raises(RefusedError, match="does not hold"):
            opened.clusters("none")


def test_a_disk_that_was_made_larger_differs_behind_its_old_end(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemuimg.create_empty(image, MIB)
    _tag(image, "small")
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(image), "2M"], check=True)
    _tag(image, "large")
    with qcow2.opened(image) as opened:
        assert qcow2.differing(opened, "small", "large").tolist() == list(range(16, 32))


def test_compressed_clusters_are_told_apart(tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"x" * MIB)
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
    _tag(image, "a")
    io(image, "write -P 1 128k 64k")
    _tag(image, "b")
    with qcow2.opened(image) as opened:
        assert qcow2.differing(opened, "a", "b").tolist() == [2]


def _patched(image: Path, offset: int, value: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(value)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda i: i.write_bytes(b"QFI"), id="short"),
        pytest.param(lambda i: i.write_bytes(bytes(4096)), id="foreign"),
        pytest.param(lambda i: _patched(i, 72, struct.pack(">Q", 1 << 4)), id="extended"),
        pytest.param(lambda i: _patched(i, 72, struct.pack(">Q", 1 << 2)), id="data-file"),
        pytest.param(lambda i: _patched(i, 20, struct.pack(">I", 63)), id="cluster"),
        pytest.param(lambda i: _patched(i, 60, struct.pack(">I", 1 << 31)), id="many"),
        pytest.param(lambda i: _patched(i, 64, struct.pack(">Q", 1 << 50)), id="table-beyond"),
        pytest.param(lambda i: os.truncate(i, 3 * CLUSTER), id="cut"),
        pytest.param(lambda i: (i.unlink(), i.symlink_to("/etc/passwd")), id="link"),
        pytest.param(lambda i: (i.unlink(), os.mkfifo(i)), id="fifo"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    image = tmp_path / "image.qcow2"
    qemuimg.create_empty(image, MIB)
    io(image, "write -P 1 0 1M")
    _tag(image, "a")
    spoil(image)
    with pytest.raises(HvctlError), qcow2.opened(image) as opened:
        opened.clusters("a")
