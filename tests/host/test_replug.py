"""hvctl reset --replug on a real guest: a disk that it uses goes away and comes again with the snapshot's content, in
its old place, whenever hvctl dies; and the snapshots fit as before."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import pytest

from host.loaded import Loaded
from host.marked import DISKS, SMALL
from host.outside import Guest, await_true, virsh
from host.site import Site
from hvctl.engine.runtime import open_engine
from hvctl.errors import UndoneError
from hvctl.model.reset import DiskPart, Scope, Wishes
from hvctl.operations import doctor
from hvctl.operations.snapshot import reset

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

# The guest may have another name for the disk that came, so it is known by its serial.
MOUNT = """
umount -l /data 2> /dev/null
found() { for d in /sys/block/vd*; do [ "$(cat $d/serial)" = data ] && echo /dev/${d##*/}; done; }
until [ -b "$(found)" ]; do sleep 0.05; done
mount -t ext4 "$(found)" /data
"""
# It has one file open, and ends when what it wrote cannot be flushed.
WRITER = "exec 3> /data/log; while echo more | dd conv=fsync >&3; do :; done; echo ended > /run/writer"


@dataclass(frozen=True)
class Used:
    """A guest with vda free and vdb mounted at /data."""

    guest: Guest

    def mark(self, word: str) -> None:
        self.guest.run(
            f"grep -q ' /data ' /proc/mounts || {{ {MOUNT} }}; echo {word} > /data/mark; echo {word} > /run/mark;"
            f" echo {word} | dd of=/dev/vda conv=sync,fsync 2> /dev/null; sync"
        )

    def marks(self) -> list[str]:
        """RAM's, the free disk's, and the mounted disk's once the one that is there now is mounted."""
        read = "dd if=/dev/vda count=1 2> /dev/null | head -n 1"
        self.guest.await_answer()
        return self.guest.run(f"{MOUNT} cat /run/mark; blockdev --flushbufs /dev/vda; {read}; cat /data/mark").split()

    def disk(self) -> tuple[str, ...]:
        """What libvirt says of vdb, but for the names of its block nodes."""
        (disk,) = (d for d in self.guest.xml().findall("devices/disk") if d.find("target[@dev='vdb']") is not None)
        for numbered in disk.iter():
            numbered.attrib.pop("index", None)
        return tuple(line.strip() for line in ElementTree.tostring(disk, encoding="unicode").splitlines())

    def definition(self) -> str:
        return virsh("dumpxml", self.guest.uuid, "--inactive")


@pytest.fixture(scope="module")
def used(site: Site) -> Iterator[Used]:
    with site.created(*SMALL, *DISKS, "--start") as guest:
        guest.await_boot()
        yield Used(guest)


@pytest.fixture(scope="module")
def nothing_left(site: Site, used: Used) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


@pytest.fixture(scope="module")
def old(command: Loaded, used: Used) -> str:
    """Snapshot s, with limits on the disks; the last test ends its process, and it with that."""
    command.ok("allocate", used.guest.name, "--iops", "2000")
    used.mark("old")
    command.ok("snapshot", "take", used.guest.name, "s")
    return used.guest.name


def replug(command: Loaded, name: str) -> Any:
    return command.json("reset", name, "--to", "s", "--only", "disk:data", "--replug")


def test_a_disk_that_the_guest_writes_to(command: Loaded, used: Used, old: str) -> None:
    used.mark("new")
    used.guest.run(f"({WRITER}) > /dev/null 2>&1 &")
    refused = command.run("reset", old, "--to", "s", "--only", "disk:data")
    assert (refused.returncode, "--replug" in refused.stderr) == (5, True)
    before, defined, pid = used.disk(), used.definition(), used.guest.pid
    done = replug(command, old)
    assert done["result"]["coherence"] == "crash-consistent"
    assert (used.disk(), used.definition(), used.guest.pid) == (before, defined, pid)
    assert used.guest.stats("blkdeviotune", "vdb")["total_iops_sec"] == "2000"
    assert used.guest.stats("domblkinfo", "vdb")["Capacity"] == str(32 << 20)
    assert used.marks() == ["new", "new", "old"], "all but the disk is as it was"
    assert used.guest.run("until [ -e /run/writer ]; do sleep 0.05; done; ls /data").split() == ["lost+found", "mark"]
    assert command.json("snapshot", "list", old)[0]["status"] == "ready"


def test_whole_resets_disks_and_replugs_in_any_order(command: Loaded, used: Used, old: str) -> None:
    used.mark("later")
    command.ok("snapshot", "take", old, "t")
    replug(command, old)
    assert used.marks() == ["later", "later", "old"]
    for name, word in (("t", "later"), ("s", "old")):
        used.mark("new")
        assert command.json("reset", old, "--to", name, "--audit")["result"]["missed"] == 0
        assert used.marks() == [word, word, word]
        used.mark("new")
        used.guest.run("umount /data")
        command.ok("reset", old, "--to", name, "--only", "disk:vdb")
        assert used.marks() == ["new", "new", word]
        replug(command, old)
        assert used.marks() == ["new", "new", "old"]
    command.ok("snapshot", "delete", old, "t")
    (kept,) = {tag for tag in used.guest.tags() if "hvctl-" in tag}
    assert kept
    assert not [line for line in used.guest.run("dmesg").splitlines() if "BUG" in line or "Call Trace" in line]


POINTS = [
    *((p, False) for p in ("prepare_disk:after", "unplug_disk:after", "touching:after")),
    *((p, True) for p in ("revert_disk:after", "plug_disk:after", "committed:after")),
]


@pytest.mark.parametrize(("point", "back"), POINTS)
def test_hvctl_is_killed(site: Site, command: Loaded, used: Used, old: str, point: str, back: bool) -> None:
    """The guest has its disk again, as it was or as it is to be; which of them is said."""
    used.mark("new")
    before, defined = used.disk(), used.definition()
    words = ("reset", old, "--to", "s", "--only", "disk:data", "--replug")
    assert command.run(*words, fault=f"reset:{point}=kill").returncode == -signal.SIGKILL
    if point == "unplug_disk:after":
        killed = command.run("recover", fault="recover-reset:plug_disk:after=kill")
        assert killed.returncode == -signal.SIGKILL
    (ended,) = command.json("recover")
    assert (ended["state"], site.open_rows()) == ("done" if back else "undone", [])
    assert (used.disk(), used.definition(), used.guest.state) == (before, defined, "running")
    assert used.marks() == ["new", "new", "old" if back else "new"]
    assert command.json("snapshot", "list", old)[0]["status"] == "ready"


def test_after_all_kills_the_snapshot_is_whole(command: Loaded, used: Used, old: str) -> None:
    assert command.json("reset", old, "--to", "s", "--audit")["result"]["missed"] == 0
    assert used.marks() == ["old", "old", "old"]


def test_a_guest_that_does_not_let_go_keeps_its_disk(
    site: Site, command: Loaded, used: Used, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not hear of what is plugged while that interrupt is off."""
    used.mark("new")
    used.guest.run("echo disable > /sys/firmware/acpi/interrupts/gpe01")
    monkeypatch.setattr("hvctl.adapters.libvirt.replug._UNPLUG_SECONDS", 1.0)
    before, part = used.disk(), Scope(False, False, (DiskPart("vdb"),))
    with (
        open_engine(site.settings) as engine,
        pytest.raises(UndoneError, match="did not let go within 1 s of disk vdb"),
    ):
        reset(engine, old, "s", part, Wishes(replug=True))
    assert (used.disk(), site.open_rows()) == (before, [])
    assert used.guest.run("cat /data/mark").split() == ["new"]
    refused = command.run("reset", old, "--to", "s")
    assert (refused.returncode, "let go of the device in slot 5" in refused.stderr) == (5, True), "QEMU would hang"
    assert (used.guest.run("cat /data/mark").split(), site.open_rows()) == (["new"], [])
    used.guest.run("echo enable > /sys/firmware/acpi/interrupts/gpe01")
    # As if it were the guest's late answer: it is the same to libvirt.
    virsh("detach-disk", old, "vdb", "--live")
    await_true(lambda: "vdb" not in virsh("domblklist", old), "the guest lets go")
    with open_engine(site.settings) as engine:
        doctor.fix(engine, doctor.look(engine), pytest.fail)
        assert doctor.look(engine) == ()
    assert used.disk() == before
    assert used.marks() == ["new", "new", "new"]
    replug(command, old)
    assert used.marks() == ["new", "new", "old"], "and lets go when it is asked again"


def test_a_vm_that_ends_in_between_starts_with_its_disk(command: Loaded, used: Used, old: str) -> None:
    used.mark("new")
    words = ("reset", old, "--to", "s", "--only", "disk:data", "--replug")
    assert command.run(*words, fault="reset:revert_disk:after=kill").returncode == -signal.SIGKILL
    virsh("destroy", used.guest.uuid)
    (ended,) = command.json("recover")
    assert ended["state"] == "failed"
    command.ok("vm", "start", old)
    used.guest.await_boot()
    assert used.guest.run("cat /data/mark").split() == ["old"]
    assert (command.json("snapshot", "list", old), used.guest.tags()) == ([], [])
