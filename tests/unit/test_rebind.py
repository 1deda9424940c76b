"""A snapshot learns the new names of block nodes, and of nothing that is not otherwise as it was."""

from __future__ import annotations

from dataclasses import replace

from hvctl.decide.rebind import rebound, renamed
from hvctl.decide.reset import binding_difference
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Process, Region

BASE = "/images/base one.qcow2"


def facts(top: int, *, file: str = "/d/b", backing: int | None = None) -> list[str]:
    """A disk with its nodes, as adapters/qemu/blockgraph has them."""
    found = [f"node libvirt-{top}-storage file rw {file}", f"disk virtio-disk1 libvirt-{top}-format 1024"]
    if backing is None:
        return [*found, f"node libvirt-{top}-format qcow2 rw {file}"]
    found += [f"node libvirt-{backing}-format qcow2 ro '{BASE}'", f"node libvirt-{top}-format qcow2 rw {file} '{BASE}'"]
    return [*found, f"bitmap seen on libvirt-{top}-format"]


OTHER = ["node libvirt-1-format qcow2 rw /d/a", f"node libvirt-2-format qcow2 ro '{BASE}'"]
OLD = Binding(Process(7, 8, "boot"), ("cpu",), tuple(sorted([*OTHER, *facts(3, backing=4)])))
NEW = replace(OLD, blocks=tuple(sorted([*OTHER, *facts(5, backing=6)])))
SNAPSHOT = Snapshot(
    "1", "s", "u", "2026-01-01T00:00:00Z", OLD, "tag", {"vda": "libvirt-1-format", "vdb": "libvirt-3-format"}, "state",
    "/s/1", (Region("ram", "/ram", 1 << 20),), 1 << 20, 1, 0,
)  # fmt: skip


def test_a_disk_that_was_plugged_again_is_the_same_to_its_snapshot() -> None:
    """Also over an image that another disk has too."""
    names = renamed(OLD, NEW)
    assert names == {f"libvirt-{a}-format": f"libvirt-{b}-format" for a, b in ((3, 5), (4, 6))} | {
        "libvirt-3-storage": "libvirt-5-storage"
    }
    now = rebound(SNAPSHOT, names)
    assert binding_difference(SNAPSHOT.binding, NEW) is not None
    assert binding_difference(now.binding, NEW) is None
    assert now.targets == {"vda": "libvirt-1-format", "vdb": "libvirt-5-format"}
    assert rebound(now, names) == now == rebound(now, renamed(OLD, NEW)), "doing it twice is doing it once"


def test_another_image_is_another_disk() -> None:
    for other in (facts(5, file="/d/c", backing=6), facts(5)):
        changed = replace(OLD, blocks=tuple(sorted([*OTHER, *other])))
        assert "libvirt-3-format" not in renamed(OLD, changed)
        assert binding_difference(rebound(SNAPSHOT, renamed(OLD, changed)).binding, changed) is not None


def test_nothing_is_renamed_while_the_disk_is_away() -> None:
    away = replace(OLD, blocks=tuple(sorted(OTHER)))
    assert renamed(OLD, away) == {}
    assert renamed(OLD, OLD) == {}
