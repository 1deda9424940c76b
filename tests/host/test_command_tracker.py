"""Which tracker finds what a guest wrote, what makes it blind, and that a page it missed is found, mended and told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.copies import PAGE, Copies, copies, ram_files
from host.loaded import Loaded
from host.marked import Marked
from host.outside import MIB, virsh
from host.site import Site

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def nothing_left(site: Site, pair: Marked) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


@pytest.fixture(scope="module")
def kept(command: Loaded, pair: Marked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copies]:
    """What snapshot s has to hold, as this test copied it."""
    guest = pair.guest
    pair.mark("old")
    virsh("suspend", guest.uuid)
    command.ok("snapshot", "take", guest.name, "s")
    yield copies(guest, tmp_path_factory.mktemp("kept"))
    command.ok("snapshot", "delete", guest.name, "s")
    virsh("resume", guest.uuid)


@pytest.fixture
def paused(pair: Marked, kept: Copies) -> Copies:
    """The guest has worked since the snapshot, and stands still before and after a reset: so it can be looked at."""
    guest = pair.guest
    virsh("resume", guest.uuid)
    guest.await_answer()
    pair.mark("new")
    virsh("suspend", guest.uuid)
    return kept


def reset(command: Loaded, pair: Marked, *options: str) -> Any:
    return command.json("reset", pair.guest.name, "--to", "s", *options)


def passes(done: Any) -> list[Any]:
    return [s["facts"] for s in done["steps"] if s["name"] == "restore_ram"]


def test_what_is_asked_for_finds_it_and_the_result_says_which(command: Loaded, pair: Marked, paused: Copies) -> None:
    for words, by in (((), "uffd"), (("--tracker", "uffd"), "uffd"), (("--tracker", "compare"), "compare")):
        assert paused.unequal() != {} if not words else True
        done = reset(command, pair, *words, "--audit")
        assert (done["result"]["tracker"], done["result"]["missed"], passes(done)[0]["by"]) == (by, 0, by)
        assert paused.unequal() == {}
    # Asked to compare, it did not go on with the other one; the next that may, does.
    assert passes(reset(command, pair))[-1]["next"] == "uffd"


def test_a_tracker_that_this_kernel_has_not_is_refused_with_the_reason(
    command: Loaded, pair: Marked, paused: Copies
) -> None:
    before = paused.unequal()
    done = command.run("reset", pair.guest.name, "--to", "s", "--tracker", "soft-dirty")
    assert (done.returncode, "soft-dirty cannot be used" in done.stderr) == (5, True), done.stderr
    assert (paused.unequal(), pair.guest.state) == (before, "paused")


def test_pages_that_the_balloon_gave_away_are_compared(command: Loaded, pair: Marked, paused: Copies) -> None:
    """Given to the host and read again, they are zero and look clean."""
    guest = pair.guest
    virsh("resume", guest.uuid)
    command.ok("allocate", guest.name, "--memory", "104MiB", "--best-effort", "--force")
    command.ok("allocate", guest.name, "--memory", "128MiB", "--force")
    assert guest.memory() == 128 * MIB
    virsh("suspend", guest.uuid)
    done = reset(command, pair)
    assert done["result"]["tracker"] == "compare"
    assert paused.unequal() == {}
    assert reset(command, pair)["result"]["tracker"] == "uffd"
    assert paused.unequal() == {}


def test_every_nth_reset_is_audited(site: Site, pair: Marked, paused: Copies) -> None:
    every = {"HVCTL_AUDIT_EVERY": "3"}
    audited = []
    for _ in range(6):
        done = site.json("reset", pair.guest.name, "--to", "s", env=every)
        audited.append("audit" in [s["name"] for s in done["steps"]])
    assert audited.count(True) == 2
    assert audited[:3] == audited[3:]
    turn = audited.index(True)
    for _ in range(turn):
        site.json("reset", pair.guest.name, "--to", "s", env=every)
    done = site.json("reset", pair.guest.name, "--to", "s", "--no-audit", env=every)
    assert "audit" not in [s["name"] for s in done["steps"]]


def test_a_page_that_was_missed_is_found_mended_and_told(
    site: Site, command: Loaded, pair: Marked, paused: Copies
) -> None:
    """Last of all: this VM has no fast tracker after it. What another process writes into the file of guest RAM, QEMU's
    page tables do not show."""
    guest = pair.guest
    reset(command, pair)
    assert paused.unequal() == {}
    page = pair.base // PAGE + 9
    write_behind(ram_files(guest.pid)[0], page, b"behind QEMU's back")

    # Not looked for, it stays: the tracker is blind for it.
    assert reset(command, pair)["result"]["tracker"] == "uffd"
    assert paused.unequal() == {"pc.ram": [page]}

    done = command.run("reset", guest.name, "--to", "s", "--audit")
    assert (done.returncode, "an audit found 1 pages" in done.stderr) == (1, True), done.stderr
    assert paused.unequal() == {}
    assert guest.state == "paused"
    (last, *_) = command.json("operation", "list", "--vm", guest.name)
    assert (last["kind"], last["state"], "not used for this VM any more" in last["reason"]) == ("reset", "failed", True)
    assert site.open_rows() == []

    # From here on it is compared, which finds what was written in whatever way, and says why.
    write_behind(ram_files(guest.pid)[0], page, b"again")
    done = reset(command, pair, "--audit")
    assert (done["result"]["tracker"], done["result"]["missed"]) == ("compare", 0)
    assert "an audit found" in passes(done)[0]["why"]
    assert paused.unequal() == {}
    refused = command.run("reset", guest.name, "--to", "s", "--tracker", "uffd")
    assert (refused.returncode, "an audit found" in refused.stderr) == (5, True), refused.stderr
    virsh("resume", guest.uuid)
    guest.await_answer()
    assert pair.marks().ram == "old"
    virsh("suspend", guest.uuid)


def write_behind(ram: Path, page: int, text: bytes) -> None:
    fd = os.open(ram, os.O_WRONLY)
    try:
        os.pwrite(fd, text, page * PAGE)
    finally:
        os.close(fd)
