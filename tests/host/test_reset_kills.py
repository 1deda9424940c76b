"""kill -9 of hvctl at each step of snapshots and of resets, whole and of parts, on a real guest: after the recovery it
runs with all of it of one moment, and nothing is left.

What a step leaves behind is what the next one finds, so most steps are killed on one side only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from host.loaded import Loaded
from host.marked import RANGE, Marked, Marks
from host.outside import Guest, alive, await_true
from host.site import Site, await_stopped, ended

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def nothing_left(site: Site, pair: Marked) -> Iterator[None]:
    """In all; each test looks into QEMU itself."""
    before = site.inventory()
    yield
    assert site.inventory() == before


def killed(command: Loaded, point: str, *argv: str) -> None:
    done = command.run(*argv, fault=f"{point}=kill")
    assert done.returncode == -signal.SIGKILL, (point, done)
    assert "done" not in done.stdout


def recovered(site: Site, command: Loaded) -> str:
    """How the one open operation ended; none may be open after it."""
    opened = site.open_rows()
    closed = command.json("recover")
    assert site.open_rows() == []
    assert [o["id"] for o in closed] == opened
    return str(closed[0]["state"]) if closed else "done"


def inside(site: Site, guest: Guest) -> dict[str, Any]:
    """What hvctl may have left in the process and beside the disks, but for what it prepares of a disk's next reset,
    and a job that is over: the next command that opens the monitor dismisses it."""
    prepared = (".spare", ".reset", ".pristine", ".hvctl-standin", ".hvctl-backing")
    folder = site.settings.vms_dir / guest.uuid
    switched = {c["capability"]: c["state"] for c in guest.qmp("query-migrate-capabilities")}
    return {
        "nodes": guest.nodes(),
        "tags": guest.tags(),
        "jobs": [j for j in guest.qmp("query-jobs") if (j["id"], j["status"]) != ("hvctl-job", "concluded")],
        "left out of saves": switched["x-ignore-shared"],
        "files": sorted(p.name for p in folder.iterdir() if not p.name.endswith(prepared)),
        "snapshots": sorted(p.name for p in site.settings.snapshots_dir.glob("*/*") if p.is_dir()),
    }


# --- taking


TAKE = [
    *("begun:after", "prepare_snapshot:after", "pause:after", "arm_tracker:after", "resume:after", "copy_ram:after"),
    *("save_state:before", "save_state:after", "publish_snapshot:before", "publish_snapshot:after", "committed:after"),
    "closed:after",
]


@pytest.mark.parametrize("point", TAKE)
def test_a_snapshot_is_whole_or_not_there(site: Site, command: Loaded, pair: Marked, point: str) -> None:
    guest = pair.guest
    pid, before = guest.pid, inside(site, guest)
    taken = pair.mark("taken")
    killed(command, f"snapshot-take:{point}", "snapshot", "take", guest.name, "s")
    state = recovered(site, command)
    assert (guest.state, guest.pid, pair.marks()) == ("running", pid, taken)
    names = [s["name"] for s in command.json("snapshot", "list", guest.name)]
    assert names == (["s"] if state == "done" else [])
    assert (state == "done") == (TAKE.index(point) >= TAKE.index("publish_snapshot:after"))
    if names:
        pair.mark("spoiled")
        assert command.json("reset", guest.name, "--to", "s", "--audit")["result"]["missed"] == 0
        guest.await_answer()
        assert pair.marks() == taken
        command.ok("snapshot", "delete", guest.name, "s")
    assert inside(site, guest) == before


# --- going back


@dataclass(frozen=True)
class Part:
    """A reset: its options, and what goes back with it."""

    options: tuple[str, ...]
    back: tuple[str, ...]

    def result(self, old: Marks, new: Marks) -> Marks:
        return replace(new, **{place: getattr(old, place) for place in self.back})


WHOLE = Part(("--audit",), ("ram", "file", "released", "beyond", "own"))
KEEP = Part(("--keep", "disk:results"), ("ram", "file", "own"))
DISK = Part(("--only", "disk:results"), ("released", "beyond"))
EXTENT = Part(("--only", f"disk:vda:{RANGE}"), ("released",))
MEMORY = Part(("--only", "ram:OWN"), ("own",))

# Up to the first irreversible write everything stays; from there on all of it goes back.
POINTS = [
    *((WHOLE, p, False) for p in ("begun:after", "pause:before", "pause:after", "touching:before")),
    *((WHOLE, p, True) for p in ("touching:after", "restore_ram:after", "load_state:after", "audit:before")),
    *((WHOLE, p, True) for p in ("committed:before", "committed:after", "resume:before", "resume:after")),
    *((WHOLE, p, True) for p in ("await_life:after", "set_record:before", "set_record:after", "closed:after")),
    *((KEEP, p, False) for p in ("pause:after",)),
    *((KEEP, p, True) for p in ("touching:after", "restore_ram:after", "load_state:after", "committed:before")),
    *((KEEP, p, True) for p in ("committed:after", "resume:after")),
    *((DISK, p, False) for p in ("prepare_disk:before", "prepare_disk:after", "touching:after")),
    *((DISK, p, True) for p in ("restore_disk:after", "committed:after", "ready_disk:before", "ready_disk:after")),
    *((EXTENT, p, False) for p in ("prepare_disk:after", "restore_disk:before")),
    *((EXTENT, p, True) for p in ("restore_disk:after",)),
    *((MEMORY, p, False) for p in ("prepare_snapshot:before", "prepare_snapshot:after", "pause:after")),
    *((MEMORY, p, False) for p in ("save_state:after", "copy_ram:after", "patch_ram:after", "publish_snapshot:after")),
    *((MEMORY, p, True) for p in ("touching:after", "restore_ram:after", "load_state:after", "committed:before")),
    *((MEMORY, p, True) for p in ("committed:after", "resume:after", "drop_snapshot:after", "closed:after")),
]  # fmt: skip


def name_of(part: Part | str | bool) -> str:
    if isinstance(part, Part):
        return " ".join(part.options).replace("--", "")
    return part if isinstance(part, str) else ("back" if part else "stays")


@pytest.fixture(scope="module")
def kept(command: Loaded, pair: Marked) -> Iterator[Marks]:
    """The snapshot that everything goes back to, and its marks."""
    old = pair.mark("old")
    command.ok("snapshot", "take", pair.guest.name, "kept", "--own", pair.own)
    yield old
    command.ok("snapshot", "delete", pair.guest.name, "kept")


def reset(pair: Marked, part: Part) -> tuple[str, ...]:
    return "reset", pair.guest.name, "--to", "kept", *(o.replace("OWN", pair.own) for o in part.options)


@pytest.mark.parametrize(("part", "point", "back"), POINTS, ids=name_of)
def test_a_reset_is_all_old_or_all_new(
    site: Site, command: Loaded, pair: Marked, kept: Marks, part: Part, point: str, back: bool
) -> None:
    guest = pair.guest
    pid, before = guest.pid, inside(site, guest)
    new = pair.mark("new")
    killed(command, f"reset:{point}", *reset(pair, part))
    assert recovered(site, command) == ("done" if back else "undone")
    assert (guest.state, guest.pid) == ("running", pid)
    guest.await_answer()
    assert pair.marks() == (part.result(kept, new) if back else new)
    # The snapshot is older than this, and a guest that came back has the present time whoever let it go on.
    assert abs(int(guest.run("date +%s")) - time.time()) < 5
    assert inside(site, guest) == before


@pytest.mark.parametrize(
    ("part", "first", "then", "back"),
    [
        (WHOLE, "restore_ram:after", "load_state:after", True),
        (WHOLE, "pause:after", "resume:before", False),
        (DISK, "restore_disk:after", "finish_disk:before", True),
        (DISK, "restore_disk:before", "finish_disk:after", False),
        (MEMORY, "touching:after", "load_state:after", True),
        (MEMORY, "copy_ram:after", "drop_snapshot:before", False),
    ],
    ids=name_of,
)
def test_a_recovery_may_be_killed_too(
    site: Site, command: Loaded, pair: Marked, kept: Marks, part: Part, first: str, then: str, back: bool
) -> None:
    guest = pair.guest
    pid, before = guest.pid, inside(site, guest)
    new = pair.mark("new")
    killed(command, f"reset:{first}", *reset(pair, part))
    killed(command, f"recover-reset:{then}", "recover")
    assert recovered(site, command) == ("done" if back else "undone")
    assert (guest.state, guest.pid) == ("running", pid)
    guest.await_answer()
    assert pair.marks() == (part.result(kept, new) if back else new)
    assert inside(site, guest) == before


def test_the_next_command_recovers_by_itself(site: Site, command: Loaded, pair: Marked, kept: Marks) -> None:
    guest = pair.guest
    pid, before = guest.pid, inside(site, guest)
    pair.mark("new")
    killed(command, "reset:load_state:before", *reset(pair, WHOLE))
    assert guest.state == "paused"
    command.ok("allocate", guest.name, "--cpu-quota", "90%")
    assert (site.open_rows(), guest.state, guest.pid) == ([], "running", pid)
    guest.await_answer()
    assert pair.marks() == kept
    assert inside(site, guest) == before
    command.ok("allocate", guest.name, "--cpu-quota", "none")


# --- deleting


@pytest.mark.parametrize("point", ["drop_snapshot:before", "drop_snapshot:after"])
def test_a_deleted_snapshot_is_gone(site: Site, command: Loaded, pair: Marked, point: str) -> None:
    guest = pair.guest
    before = inside(site, guest)
    command.ok("snapshot", "take", guest.name, "s")
    killed(command, f"snapshot-delete:{point}", "snapshot", "delete", guest.name, "s")
    assert recovered(site, command) == "done"
    assert "s" not in {s["name"] for s in command.json("snapshot", "list", guest.name)}
    assert (inside(site, guest), guest.state) == (before, "running")


@pytest.mark.parametrize(
    ("point", "then"),
    [
        ("touching:before", ""),
        ("drop_snapshot:before", ""),
        ("drop_snapshot:after", "recover-snapshot-delete:drop_snapshot:before"),
        ("drop_snapshot:before", "recover-snapshot-delete:drop_snapshot:after"),
    ],
)
def test_a_snapshot_that_another_one_builds_on(
    site: Site, command: Loaded, pair: Marked, point: str, then: str
) -> None:
    """It is gone for good, and the other one is exact."""
    guest = pair.guest
    before = inside(site, guest)
    pair.mark("first")
    command.ok("snapshot", "take", guest.name, "first")
    second = pair.mark("second")
    command.ok("snapshot", "take", guest.name, "second")
    killed(command, f"snapshot-delete:{point}", "snapshot", "delete", guest.name, "first")
    if then:
        killed(command, then, "recover")
    assert recovered(site, command) == "done"
    names = {s["name"] for s in command.json("snapshot", "list", guest.name)}
    assert names & {"first", "second"} == {"second"}
    pair.mark("spoiled")
    assert command.json("reset", guest.name, "--to", "second", "--audit")["result"]["missed"] == 0
    guest.await_answer()
    assert pair.marks() == second
    command.ok("snapshot", "delete", guest.name, "second")
    assert inside(site, guest) == before


# --- a disk that is killed amid its change of places


SWAP = """
import os, sys
from pathlib import Path
from hvctl.adapters.disks import diskspare
from hvctl.adapters.disks import diskswap
from hvctl.adapters.qemu.qmp import Qmp
overlay, monitor, step = sys.argv[1:]
plan = diskspare.prepared(Path(overlay))
with Qmp(monitor, 30) as qmp:
    diskswap.restore_disk(qmp, plan, at=lambda at: os.kill(os.getpid(), 9) if at == step else None)
"""


@pytest.mark.parametrize(
    ("step", "back"),
    [
        *((step, False) for step in ("keep", "add-standin", "set-standin")),
        *((step, True) for step in ("del-format", "rename", "mirror", "complete", "del-standin")),
    ],
)
def test_a_disk_that_was_being_exchanged(
    site: Site, command: Loaded, pair: Marked, kept: Marks, step: str, back: bool
) -> None:
    """Forward once the guest had the new disk, and back before: it may have taken up the old one again since."""
    guest = pair.guest
    pid, before = guest.pid, inside(site, guest)
    new = pair.mark("new")
    killed(command, "reset:restore_disk:before", *reset(pair, DISK))
    monitor = site.settings.vms_dir / guest.uuid / "qmp" / "monitor.sock"
    words = [sys.executable, "-c", SWAP, str(guest.overlays()[0]), str(monitor), step]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert recovered(site, command) == ("done" if back else "undone")
    assert (guest.state, guest.pid) == ("running", pid)
    assert pair.marks() == (DISK.result(kept, new) if back else new)
    assert inside(site, guest) == before


def test_a_disk_that_its_guest_uses_again_is_not_taken_away(
    site: Site, command: Loaded, pair: Marked, kept: Marks
) -> None:
    """Between the kill and the recovery the guest runs, and knows nothing of either."""
    guest = pair.guest
    guest.run("mke2fs -q /dev/vda; blockdev --flushbufs /dev/vda")
    killed(command, "reset:touching:after", *reset(pair, DISK))
    guest.run("mkdir -p /mine; mount -t ext2 /dev/vda /mine; echo mine > /mine/file; sync")
    assert recovered(site, command) == "undone"
    guest.run("umount /mine; blockdev --flushbufs /dev/vda; mount -t ext2 /dev/vda /mine; grep mine /mine/file")
    guest.run("umount /mine; blockdev --flushbufs /dev/vda")


# --- QEMU dies


@pytest.fixture(scope="module")
def mortal(site: Site) -> Iterator[Guest]:
    with site.created("--memory", "128MiB", "--max-memory", "128MiB", "--start") as guest:
        yield guest


@pytest.mark.parametrize(
    "point",
    [
        "restore_ram:before",
        "load_state:before",
        "load_state:after",
        "resume:before",
        "await_life:before",
    ],
)
def test_qemu_killed_at_each_step_of_a_reset(site: Site, command: Loaded, mortal: Guest, point: str) -> None:
    """Nothing hangs, the reset is a failed one and the VM off, and it starts again from its disks."""
    command.ok("snapshot", "take", mortal.name, "s")
    reset = site.spawn("reset", mortal.name, "--to", "s", "--audit", fault=f"reset:{point}=stop")
    await_stopped(reset)
    pid = mortal.pid
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: not alive(pid) and mortal.state == "shut off", "libvirt sees that QEMU is gone")
    reset.send_signal(signal.SIGCONT)
    status, said = ended(reset)
    assert status in (1, 3, 4, 9), said
    assert "Traceback" not in said
    command.run("recover")
    assert site.open_rows() == []
    (last, *_) = command.json("operation", "list", "--vm", mortal.name)
    assert (last["kind"], last["state"], mortal.state) == ("reset", "failed", "shut off")
    command.ok("vm", "start", mortal.name)
    assert (command.json("snapshot", "list", mortal.name), mortal.nodes(), mortal.tags()) == ([], [], [])
    mortal.await_boot()
