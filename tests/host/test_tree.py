"""Several snapshots of one VM: each costs what it changes, any is reached from any, and whichever go, the others stay
exact. What RAM and disks must be was copied by the test itself while the guest was paused."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host.copies import PAGE, Copies, copies
from host.loaded import Loaded
from host.marked import DISKS, SMALL, Marked, Marks, with_own
from host.outside import KIB, MIB, Guest, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

COUNT = 10
COPIED = (0, 4, 9)  # of these the test keeps what they are; the others are audited
WALK = 18
# What changes from one to the next; the guest's own doing comes on top.
CHANGE = 1 * MIB


@pytest.fixture(scope="module")
def pair(site: Site) -> Iterator[Marked]:
    with site.created(*SMALL, *DISKS, "--start") as guest:
        yield with_own(guest)


@pytest.fixture
def nothing_left(site: Site, pair: Marked) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


def listed(command: Loaded, guest: Guest) -> dict[str, Any]:
    return {s["name"]: s for s in command.json("snapshot", "list", guest.name)}


def take(command: Loaded, guest: Guest, name: str, folder: Path | None = None) -> Copies | None:
    """With a copy of what the guest was at that moment, if there is a folder for it."""
    if folder is None:
        command.ok("snapshot", "take", guest.name, name)
        return None
    virsh("suspend", guest.uuid)
    command.ok("snapshot", "take", guest.name, name)
    kept = copies(guest, folder)
    virsh("resume", guest.uuid)
    return kept


def go(command: Loaded, guest: Guest, name: str, kept: Copies | None) -> None:
    """Back to it, with every page compared: by hvctl, or by the test while the guest is still paused."""
    if kept is None:
        assert command.json("reset", guest.name, "--to", name, "--audit")["result"]["missed"] == 0
        return
    virsh("suspend", guest.uuid)
    done = command.json("reset", guest.name, "--to", name)
    assert done["result"]["tracker"] == "uffd"
    assert kept.unequal() == {}
    virsh("resume", guest.uuid)


def test_ten_snapshots_cost_what_they_change_and_stay_exact_whichever_go(
    site: Site, command: Loaded, pair: Marked
) -> None:
    guest, chosen = pair.guest, random.Random(1)
    marks: dict[str, Marks] = {}
    kept: dict[str, Copies | None] = {}
    with tempfile.TemporaryDirectory(dir=site.settings.ram_dir) as folder:
        for n in range(COUNT):
            name = f"s{n}"
            guest.run(f"dd if=/dev/urandom of=/run/change bs=64k count={CHANGE // (64 * KIB)} 2> /dev/null")
            marks[name] = pair.mark(name)
            kept[name] = take(command, guest, name, Path(folder) if n in COPIED else None)

        found = listed(command, guest)
        first, *later = (found[name]["stored"] for name in marks)
        assert sum(later) < first / 2, (first, later)
        assert [found[f"s{n}"]["parent"] for n in range(1, COUNT)] == [found[f"s{n}"]["id"] for n in range(COUNT - 1)]
        held = sum(f.stat().st_blocks * 512 for f in site.settings.snapshots_dir.glob(f"{guest.uuid}/*/*"))
        assert first + sum(later) <= held < first + sum(later) + COUNT * 64 * KIB

        for name in [*chosen.choices(list(marks), k=WALK), *(f"s{n}" for n in COPIED)]:
            go(command, guest, name, kept[name])
        guest.await_answer()
        assert pair.marks() == marks[name]

        left = list(marks)
        while left:
            # The root, the newest and what is between: whatever comes, those that are left have to be reached.
            gone = left.pop(chosen.randrange(len(left)))
            command.ok("snapshot", "delete", guest.name, gone)
            assert set(listed(command, guest)) == set(left)
            for name in chosen.sample(left, min(2, len(left))):
                go(command, guest, name, kept[name])
        assert not (site.settings.snapshots_dir / guest.uuid).exists()
        assert guest.state == "running"
        guest.await_answer()


def test_a_branch_builds_on_what_was_gone_back_to(command: Loaded, pair: Marked) -> None:
    guest = pair.guest
    pair.mark("root")
    command.ok("snapshot", "take", guest.name, "root")
    marks = {}
    for name in ("left", "right"):
        go(command, guest, "root", None)
        guest.await_answer()
        marks[name] = pair.mark(name)
        command.ok("snapshot", "take", guest.name, name)
    found = listed(command, guest)
    assert {found[n]["parent"] for n in marks} == {found["root"]["id"]}
    command.ok("snapshot", "delete", guest.name, "root")
    for name in ("left", "right", "left"):
        go(command, guest, name, None)
        guest.await_answer()
        assert pair.marks() == marks[name]
    for name in marks:
        command.ok("snapshot", "delete", guest.name, name)


def test_what_a_deleted_snapshot_held_is_given_back(site: Site, command: Loaded, pair: Marked) -> None:
    """Another one builds on it, and has a page of its own in the place: nobody can reach the deleted one's any more."""
    guest, page = pair.guest, pair.base // PAGE + 7
    pair.mark("base")
    command.ok("snapshot", "take", guest.name, "base")
    pair.mark("secret")
    command.ok("snapshot", "take", guest.name, "secret")
    folder = site.settings.snapshots_dir / guest.uuid / listed(command, guest)["secret"]["id"]
    row = int(np.fromfile(folder / "index", np.int32)[page])
    assert stored(folder, row).startswith(b"secret\n")
    after = pair.mark("after")
    command.ok("snapshot", "take", guest.name, "after")

    before = (folder / "ram").stat().st_blocks
    command.ok("snapshot", "delete", guest.name, "secret")
    assert not (folder / "vmstate.qcow2").exists()
    assert stored(folder, row) == bytes(PAGE)
    assert (folder / "ram").stat().st_blocks <= before - PAGE // 512
    assert set(listed(command, guest)) == {"base", "after"}
    assert "no snapshot secret" in command.run("reset", guest.name, "--to", "secret").stderr
    go(command, guest, "after", None)
    guest.await_answer()
    assert pair.marks() == after
    command.ok("snapshot", "delete", guest.name, "after")
    assert not folder.exists()
    command.ok("snapshot", "delete", guest.name, "base")


def stored(folder: Path, row: int) -> bytes:
    with (folder / "ram").open("rb") as ram:
        ram.seek(row * PAGE)
        return ram.read(PAGE)


def test_a_budget_is_kept_and_a_snapshot_beyond_it_leaves_nothing(site: Site, command: Loaded, pair: Marked) -> None:
    guest = pair.guest
    with tempfile.TemporaryDirectory(dir=site.settings.ram_dir) as folder:
        pair.mark("base")
        kept = take(command, guest, "base", Path(folder))
        before = site.inventory()

        # Foreseen, before anything is touched.
        done = site.run("snapshot", "take", guest.name, "more", env={"HVCTL_SNAPSHOT_BUDGET": "16MiB"})
        assert (done.returncode, "it needs" in done.stderr, "are free" in done.stderr) == (5, True, True), done.stderr
        assert (site.inventory(), guest.state) == (before, "running")

        # Seen only when RAM is stored: much more was written than the last one had.
        guest.run("dd if=/dev/urandom of=/run/much bs=1M count=24 2> /dev/null")
        new = pair.mark("new")
        room = site.settings.memory_margin + 8 * MIB
        held = sum(f.stat().st_blocks * 512 for f in site.settings.snapshots_dir.glob(f"{guest.uuid}/*/*"))
        done = site.run("snapshot", "take", guest.name, "more", env={"HVCTL_SNAPSHOT_BUDGET": f"{held + room}B"})
        assert (done.returncode, "would take more than" in done.stderr) == (8, True), done.stderr
        assert (site.inventory(), guest.state, pair.marks()) == (before, "running", new)

        # What was asked of the tracker meanwhile is not forgotten.
        virsh("suspend", guest.uuid)
        command.ok("reset", guest.name, "--to", "base")
        assert kept is not None
        assert kept.unequal() == {}
        virsh("resume", guest.uuid)
        guest.await_answer()
    command.ok("snapshot", "take", guest.name, "more")
    for name in ("more", "base"):
        command.ok("snapshot", "delete", guest.name, name)
