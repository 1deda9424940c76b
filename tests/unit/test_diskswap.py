"""A swap of one disk against a model of QEMU's block nodes: killed before every step, refused at every command.

The files are real ones, and the model opens them as QEMU would: what is "open" is so in /proc.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvctl import codec
from hvctl.adapters.disks import diskpart, diskseat, diskspare
from hvctl.adapters.disks.diskfiles import Files, identity
from hvctl.adapters.disks.diskseat import Seat
from hvctl.adapters.disks.diskspare import Plan
from hvctl.adapters.disks.diskswap import restore_disk
from hvctl.adapters.qemu.qmp import JOB_ID
from hvctl.errors import GuestError, HvctlError, RefusedError, UnreachableError
from hvctl.model.vm import Process

SIZE = 1 << 20
DEVICE = "/machine/peripheral/virtio-disk1/virtio-backend"
FORMAT, STORAGE = "libvirt-1-format", "libvirt-1-storage"
TAG = {"id": "1", "name": "hvctl-1", "date-sec": 1}
STANDIN = "hvctl-standin-vdb"
BACKING = f"{STANDIN}-back"
WHOLE = [
    *("keep", "add-back-file", "add-back", "add-standin-file", "add-standin", "iothreads", "set-standin"),
    *("del-format", "del-storage", "rename", "add-storage", "add-format", "mirror", "complete", "dismiss"),
    *("del-standin", "del-standin-file", "del-back", "del-back-file", "clean"),
]
EXCHANGED = WHOLE[WHOLE.index("set-standin") + 1 :]  # killed before one of these, the guest has what it goes back to
PAUSED = ["stop", "set-standin", "cont"]  # instead of the exchange alone, where it needs a guest that stands still


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Qemu:
    """Block nodes, one device, a block job, and vCPUs that run or not; an image is its text. `refuse` holds commands
    that fail once, `broken` files that cannot be opened, `exported` a node that somebody else uses, `slow` whether
    the job does not get ready while the guest runs, `job_error` what becomes of it, `threads` whether the device has
    one of its own."""

    def __init__(self, overlay: Path) -> None:
        self.status = "running"
        self.drive = FORMAT
        self.nodes: dict[str, dict[str, Any]] = {}
        self.open: dict[str, int] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.refuse: list[tuple[str, str]] = []
        self.broken: set[tuple[int, int]] = set()
        self.exported: str | None = None
        self.slow = False
        self.job_error: str | None = None
        self.threads = False
        self.iops = 5
        self.written = 0
        self.log: list[str] = []
        self.execute("blockdev-add", storage(overlay))
        self.execute("blockdev-add", format())

    def close(self) -> None:
        for fd in self.open.values():
            os.close(fd)

    def execute_all(self, commands: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[Any]:
        """QEMU does all of them, whatever becomes of those before."""
        answers, error = [], None
        for command, arguments in commands:
            try:
                answers.append(self.execute(command, arguments))
            except GuestError as e:
                error = error or e
        if error is not None:
            raise error
        return answers

    def execute(self, command: Any, arguments: Mapping[str, Any] | None = None) -> Any:
        a = dict(arguments or {})
        self.log.append(command)
        subject = a.get("node-name") or a.get("value") or ""
        if (command, subject) in self.refuse:
            self.refuse.remove((command, subject))
            raise GuestError(f"QEMU refuses {command}: no.")
        return getattr(self, "_" + command.replace("-", "_"))(a)

    def until(self, event: str, done: Callable[[], bool], seconds: float) -> bool:
        return done()

    def dismiss_jobs(self) -> None:
        for job in [j for j in self.jobs.values() if j["status"] == "concluded"]:
            self._job_dismiss(job)

    def _stop(self, a: dict[str, Any]) -> None:
        self.status = "paused"
        for job in self.jobs.values():
            job["status"] = "ready" if job["status"] == "running" else job["status"]

    def _cont(self, a: dict[str, Any]) -> None:
        self.status = "running"

    def _blockdev_add(self, a: dict[str, Any]) -> None:
        name = a["node-name"]
        if name in self.nodes:
            raise GuestError("QEMU refuses blockdev-add: duplicate node name.")
        if a["driver"] == "file":
            if not Path(a["filename"]).exists() or identity(Path(a["filename"])) in self.broken:
                raise GuestError("QEMU refuses blockdev-add: could not open.")
            self.open[name] = os.open(a["filename"], os.O_RDONLY if a.get("read-only") else os.O_RDWR)
        if any(a.get(below) and a[below] not in self.nodes for below in ("file", "backing")):
            raise GuestError("QEMU refuses blockdev-add: cannot find what is below.")
        self.nodes[name] = a

    def _blockdev_del(self, a: dict[str, Any]) -> None:
        name = a["node-name"]
        users = [n for n, node in self.nodes.items() if name in (node.get("file"), node.get("backing"))]
        if name not in self.nodes or name in (self.drive, self.exported) or users or self.jobs:
            raise GuestError("QEMU refuses blockdev-del: in use.")
        del self.nodes[name]
        if name in self.open:
            os.close(self.open.pop(name))

    def _qom_set(self, a: dict[str, Any]) -> None:
        assert (a["path"], a["property"]) == (DEVICE, "drive")
        assert a["value"] != self.drive, "QEMU 7.2 aborts of this"
        if a["value"] not in self.nodes or (self.threads and self.status == "running"):
            raise GuestError("QEMU refuses qom-set: no such node in this context.")
        self.drive = a["value"]

    def _blockdev_mirror(self, a: dict[str, Any]) -> None:
        assert (a["sync"], a["device"], a["auto-dismiss"]) == ("top", self.drive, False)
        if a["job-id"] in self.jobs:
            raise GuestError("QEMU refuses blockdev-mirror: the name is taken.")
        slow = self.slow and self.status == "running"
        self.jobs[a["job-id"]] = {"id": a["job-id"], "status": "running" if slow else "ready", "target": a["target"]}

    def _job_complete(self, a: dict[str, Any]) -> None:
        job = self.jobs[a["id"]]
        assert job["status"] == "ready"
        job["status"] = "concluded"
        if self.job_error:
            job["error"] = self.job_error
            return
        if text := self._own(self.drive):
            self._write(job["target"], text)
        self.drive = job["target"]

    def _job_dismiss(self, a: dict[str, Any]) -> None:
        assert self.jobs.pop(a["id"])["status"] == "concluded"

    def _query_iothreads(self, a: dict[str, Any]) -> Any:
        return [{"id": "iothread1"}] if self.threads else []

    def _query_jobs(self, a: dict[str, Any]) -> Any:
        return list(self.jobs.values())

    def _query_status(self, a: dict[str, Any]) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def _query_block(self, a: dict[str, Any]) -> Any:
        return [{"qdev": DEVICE, "inserted": {"node-name": self.drive, "iops": self.iops}}, {"device": "", "qdev": "c"}]

    def _query_blockstats(self, a: dict[str, Any]) -> Any:
        return [{"qdev": DEVICE, "stats": {"wr_bytes": self.written, "rd_bytes": 7}}]

    def _query_named_block_nodes(self, a: dict[str, Any]) -> Any:
        return [shown(node) for node in self.nodes.values()]

    # --- the guest's side

    @property
    def reads(self) -> str:
        """What the guest would read from its disk."""
        return self._own(self.drive) or self._own(self.nodes[self.drive]["backing"])

    def writes(self, text: str) -> None:
        self._write(self.drive, text)

    def _own(self, node: str) -> str:
        return os.pread(self.open[self.nodes[node]["file"]], 100, 0).decode()

    def _write(self, node: str, text: str) -> None:
        os.pwrite(self.open[self.nodes[node]["file"]], text.encode(), 0)


def shown(node: dict[str, Any]) -> dict[str, Any]:
    image: dict[str, Any] = {"format": node["driver"], "filename": "f", "actual-size": id(node) % 1000}
    if node["driver"] == "qcow2":
        image["snapshots"] = [TAG]
    cache = {"direct": False, "no-flush": True, "writeback": True}
    return {"node-name": node["node-name"], "drv": node["driver"], "image": image, "cache": cache}


def storage(overlay: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(overlay), "node-name": STORAGE, "cache": {"no-flush": True}}


def format() -> dict[str, Any]:
    return {"driver": "qcow2", "file": STORAGE, "node-name": FORMAT, "cache": {"no-flush": True}}


class Disk:
    """An overlay that holds "now" and a spare that holds "then", ready for a reset."""

    def __init__(self, folder: Path, *, quiet: bool = False, threads: bool = False) -> None:
        self.files = Files(folder / "extra.qcow2")
        self.files.overlay.write_text("now")
        self.qemu = Qemu(self.files.overlay)
        self.qemu.threads = threads
        for file in (self.files.spare, self.files.backing):
            file.write_text("then")
        self.files.standin.touch()
        nodes = [shown(n) for n in self.qemu.nodes.values()]
        seat = Seat(
            life=Process(os.getpid(), 1, "boot"),
            target="vdb",
            device=DEVICE,
            path=str(self.files.overlay),
            size=SIZE,
            backing=None,
            tags=diskseat.tags({"snapshots": [TAG]}),
            format=format(),
            storage=storage(self.files.overlay),
            look=diskseat.look(nodes[1], nodes[0]),
            thresholds={},
        )
        extent = (0, 512) if quiet else None
        mark = diskspare.quiet_mark(self.qemu.execute("query-blockstats"), seat) if quiet else None
        self.plan = Plan(seat, "hvctl-1", extent, identity(self.files.spare), mark)
        self.files.plan.write_bytes(codec.dump_json(self.plan))
        self.files.plan.chmod(0o600)
        self.qemu.log.clear()

    def restore(self, kill: str | None = None, *, names: list[str] | None = None, do: Any = None) -> None:
        def at(step: str) -> None:
            if names is not None:
                names.append(step)
            if step == kill:
                raise Killed
            if do is not None:
                do(step)

        try:
            listens = kill or do or names is not None
            restore_disk(self.qemu, self.plan, at=at if listens else None)  # type: ignore[arg-type]
        except Killed:
            return
        assert kill is None, f"there is no step {kill}"

    def finish(self) -> None:
        """As recovery does."""
        held = SimpleNamespace(qmp=self.qemu, forget=lambda: None)
        vm = SimpleNamespace(name="v", disks=[SimpleNamespace(target="vdb", path=str(self.files.overlay))])
        back = diskpart.is_back(held, vm, "vdb")  # type: ignore[arg-type]
        diskpart.finish(held, vm, "vdb")  # type: ignore[arg-type]
        assert diskpart.is_back(held, vm, "vdb") == back, "a recovery that is repeated answers the same"  # type: ignore[arg-type]

    def check_back(self, content: str = "then") -> None:
        self.check_settled(content)
        assert identity(self.files.overlay) == self.plan.spare
        assert not self.files.spare.exists()

    def check_settled(self, content: str) -> None:
        """The disk is there with this content, as libvirt knows it, and nothing is left."""
        assert (self.qemu.reads, self.files.overlay.read_text()) == (content, content)
        assert (self.qemu.drive, self.qemu.jobs) == (FORMAT, {})
        assert set(self.qemu.nodes) == {FORMAT, STORAGE}
        assert self.qemu.nodes[FORMAT] == format()
        assert self.qemu.nodes[STORAGE] == storage(self.files.overlay)
        assert not any(f.exists() for f in (self.files.old, self.files.standin, self.files.backing))
        assert self.files.plan.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.qemu.close()


@pytest.fixture
def again(tmp_path: Path) -> Iterator[Any]:
    """A fresh disk for every turn of a loop."""
    every: list[Disk] = []

    def make(**options: Any) -> Disk:
        folder = tmp_path / str(len(every))
        folder.mkdir()
        every.append(Disk(folder, **options))
        return every[-1]

    yield make
    for one in every:
        one.qemu.close()


# --- as it should go


def test_the_steps_in_their_order(disk: Disk) -> None:
    names: list[str] = []
    disk.restore(names=names)
    assert names == WHOLE
    disk.check_back()
    assert disk.qemu.status == "running"


def test_all_at_once_does_the_same(disk: Disk) -> None:
    disk.restore()
    disk.check_back()
    assert disk.qemu.status == "running"


def test_the_guest_runs_on_and_always_has_a_disk(disk: Disk) -> None:
    """Its old one until the exchange, and what it goes back to from then on."""

    def look(step: str) -> None:
        assert disk.qemu.reads == ("then" if step in EXCHANGED else "now"), step
        assert disk.qemu.status == "running", step

    disk.restore(do=look)


@pytest.mark.parametrize("options", [{"threads": True}, {"quiet": True}], ids=str)
def test_a_guest_that_has_to_be_stopped_is_for_the_exchange_alone(again: Any, options: dict[str, bool]) -> None:
    """One with a thread of its own is changed only then, and nobody may write to one of which a range goes back."""
    disk = again(**options)
    names: list[str] = []

    def look(step: str) -> None:
        assert (disk.qemu.status == "paused") == (step in ("count", "set-standin", "cont")), step

    disk.restore(names=names, do=look)
    disk.check_back()
    assert [n for n in names if n in PAUSED] == PAUSED
    assert disk.qemu.status == "running"
    for step in PAUSED:
        disk = again(**options)
        disk.restore(kill=step)
        assert (disk.qemu.status == "paused") == (step != "stop")
        assert disk.qemu.reads == ("then" if step == "cont" else "now")
        disk.finish()
        disk.check_settled("then" if step == "cont" else "now")
        assert (disk.qemu.status == "paused") == (step != "stop"), "who paused it, the caller knows"


@pytest.mark.parametrize("step", EXCHANGED)
def test_what_the_guest_writes_meanwhile_stays(disk: Disk, step: str) -> None:
    def write(at: str) -> None:
        if at == step:
            disk.qemu.writes("more")

    disk.restore(do=write)
    disk.check_back("more")


def test_done_is_done(disk: Disk) -> None:
    """What the guest wrote after a reset is not taken back by a repetition, and it is not paused for one."""
    disk.restore()
    disk.qemu.writes("more")
    disk.qemu.log.clear()
    disk.restore()
    assert disk.qemu.reads == "more"
    assert not set(disk.qemu.log) - {"query-status", "query-block", "query-named-block-nodes"}


def test_a_paused_guest_stays_paused(disk: Disk) -> None:
    disk.qemu.status = "paused"
    disk.restore()
    disk.check_back()
    assert disk.qemu.status == "paused"
    assert not {"stop", "cont"} & set(disk.qemu.log)


def test_a_threshold_of_libvirt_is_set_again(disk: Disk) -> None:
    disk.plan.seat.thresholds[STORAGE] = 4096
    seen: list[Any] = []
    disk.qemu._block_set_write_threshold = seen.append  # type: ignore[attr-defined]
    disk.restore()
    assert seen == [{"node-name": STORAGE, "write-threshold": 4096}]


def test_a_guest_that_writes_faster_than_can_be_copied_is_stopped(disk: Disk) -> None:
    disk.qemu.slow = True
    names: list[str] = []
    disk.restore(names=names)
    disk.check_back()
    assert disk.qemu.status == "running"
    assert names[names.index("mirror") :][:5] == ["mirror", "halt", "complete", "go-on", "dismiss"]


# --- killed


@pytest.mark.parametrize("by", ["finish", "restore"])
def test_killed_before_every_step_and_ended(again: Any, by: str) -> None:
    """By the same call, or by a recovery, which has the guest keep its disk if it still had it."""
    for step in WHOLE:
        disk = again()
        disk.restore(kill=step)
        assert disk.qemu.reads == ("then" if step in EXCHANGED else "now")
        if by == "restore":
            disk.restore()
            disk.check_back()
            continue
        disk.finish()
        if step in EXCHANGED:
            disk.check_back()
        elif step != "keep":
            disk.check_settled("now")
        assert not {"stop", "cont"} & set(disk.qemu.log)


def test_killed_and_used_for_long_by_the_guest(again: Any) -> None:
    for step in EXCHANGED:
        disk = again()
        disk.restore(kill=step)
        disk.qemu.writes("more")
        disk.finish()
        disk.check_back("more")


def test_killed_twice_at_any_two_steps(again: Any) -> None:
    for first in WHOLE:
        for second in WHOLE:
            disk = again()
            disk.restore(kill=first)
            names: list[str] = []
            try:
                disk.restore(kill=second, names=names)
            except AssertionError:
                # The second time is over without this step: its end was reached.
                assert second not in names
            else:
                disk.restore()
            disk.check_back()


@pytest.mark.parametrize("status", ["running", "ready"])
def test_a_job_that_a_killed_process_left_is_taken_up(disk: Disk, status: str) -> None:
    disk.restore(kill="complete")
    disk.qemu.status = "running"
    disk.qemu.jobs[JOB_ID]["status"] = status
    disk.qemu.log.clear()
    disk.finish()
    disk.check_back()
    assert "blockdev-mirror" not in disk.qemu.log
    assert disk.qemu.status == "running"


# --- refused by QEMU


@pytest.mark.parametrize(
    ("command", "node"),
    [
        *(("blockdev-add", f"{BACKING}-file"), ("blockdev-add", BACKING)),
        *(("blockdev-add", f"{STANDIN}-file"), ("blockdev-add", STANDIN), ("qom-set", STANDIN)),
    ],
)
@pytest.mark.parametrize("listened", [True, False])
@pytest.mark.parametrize("threads", [True, False])
def test_refused_before_the_exchange(again: Any, command: str, node: str, listened: bool, threads: bool) -> None:
    """The guest goes on with the disk that it had, and never had another one."""
    disk = again(threads=threads)
    disk.qemu.refuse.append((command, node))
    with pytest.raises(HvctlError, match="was not reset") as raised:
        disk.restore(names=[] if listened else None)
    assert type(raised.value) is HvctlError
    disk.check_settled("now")
    assert disk.qemu.status == "running"


@pytest.mark.parametrize(
    ("command", "node"),
    [
        *(("blockdev-del", FORMAT), ("blockdev-del", STORAGE)),
        *(("blockdev-add", STORAGE), ("blockdev-add", FORMAT)),
    ],
)
@pytest.mark.parametrize("listened", [True, False])
@pytest.mark.parametrize("threads", [True, False])
def test_refused_after_the_exchange(again: Any, command: str, node: str, listened: bool, threads: bool) -> None:
    """The old disk takes its place again."""
    disk = again(threads=threads)
    disk.qemu.refuse.append((command, node))
    with pytest.raises(HvctlError, match="was not reset") as raised:
        disk.restore(names=[] if listened else None)
    assert type(raised.value) is HvctlError
    disk.check_settled("now")
    assert disk.qemu.status == "running"
    disk.finish()
    disk.check_settled("now")


@pytest.mark.parametrize("node", [FORMAT, STORAGE])
def test_a_node_that_somebody_else_uses(disk: Disk, node: str) -> None:
    disk.qemu.exported = node
    with pytest.raises(HvctlError, match="in use"):
        disk.restore()
    disk.check_settled("now")
    assert disk.qemu.status == "running"


def test_a_spare_that_qemu_cannot_open(disk: Disk) -> None:
    disk.qemu.broken.add(disk.plan.spare)
    with pytest.raises(HvctlError, match="could not open"):
        disk.restore()
    disk.check_settled("now")
    assert disk.qemu.status == "running"


def test_killed_while_the_old_disk_takes_its_place_again(again: Any) -> None:
    """Forward, once the cause is gone: nobody can tell any more what the guest wrote since."""
    for step in ("del-storage", "set-own"):
        disk = again()
        disk.qemu.refuse.append(("blockdev-add", FORMAT))
        seen: list[str] = []

        def at(name: str, seen: list[str] = seen, step: str = step) -> None:
            seen.append(name)
            if name == step and seen.count("rename") and (step == "set-own" or seen.count(step) == 2):
                raise Killed

        disk.restore(do=at)
        disk.finish()
        disk.check_back()


def test_a_spare_that_cannot_be_opened_by_a_recovery(disk: Disk) -> None:
    """The guest may have worked on the stand-in for long: it keeps that, and the same call ends it later."""
    disk.restore(kill="rename")
    disk.qemu.writes("more")
    disk.qemu.broken.add(disk.plan.spare)
    with pytest.raises(UnreachableError, match="has gone back, but is not in its own place yet"):
        disk.finish()
    assert (disk.qemu.reads, disk.qemu.status) == ("more", "running")
    disk.qemu.broken.clear()
    disk.finish()
    disk.check_back("more")


def test_a_job_that_fails(disk: Disk) -> None:
    disk.qemu.job_error = "No space left on device"
    with pytest.raises(UnreachableError, match="No space left"):
        disk.restore()
    assert (disk.qemu.reads, disk.qemu.status, disk.qemu.jobs) == ("then", "running", {})
    disk.qemu.writes("more")
    disk.qemu.job_error = None
    disk.finish()
    disk.check_back("more")


def test_a_rename_that_fails(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(HvctlError, match="No space left"):
        disk.restore()
    monkeypatch.undo()
    disk.check_settled("now")
    assert disk.qemu.status == "running"


# --- seen afterwards


def test_a_node_that_came_back_otherwise_is_not_given_to_the_guest(disk: Disk) -> None:
    look = json.loads(disk.plan.seat.look)
    look[0]["cache"]["direct"] = True
    object.__setattr__(disk.plan.seat, "look", json.dumps(look, sort_keys=True))
    with pytest.raises(HvctlError, match="not as before"):
        disk.restore()
    disk.check_settled("now")


def test_another_file_behind_the_nodes_is_not_given_to_the_guest(disk: Disk) -> None:
    other = disk.files.overlay.with_name("other")
    other.write_text("what nobody prepared")
    disk.plan.seat.storage["filename"] = str(other)
    with pytest.raises(HvctlError, match="another file open"):
        disk.restore()
    assert "blockdev-mirror" not in disk.qemu.log


def test_limits_that_are_lost_are_told(disk: Disk) -> None:
    def lose(step: str) -> None:
        if step == "dismiss":
            disk.qemu.iops = 0

    with pytest.raises(UnreachableError, match="limits"):
        disk.restore(do=lose)


# --- what does not fit


@pytest.mark.parametrize("status", ["io-error", "inmigrate", "internal-error", "shutdown"])
def test_a_guest_in_another_state(disk: Disk, status: str) -> None:
    disk.qemu.status = status
    with pytest.raises(RefusedError, match=status):
        disk.restore()
    assert disk.qemu.log == ["query-status", "query-block", "query-named-block-nodes"]


def test_a_spare_that_is_another_file(disk: Disk) -> None:
    other = disk.files.spare.with_name("other")
    other.write_text("what somebody put there")
    other.replace(disk.files.spare)
    with pytest.raises(RefusedError, match="does not fit any more"):
        disk.restore()
    assert disk.qemu.reads == "now"


def test_another_set_of_snapshots(disk: Disk) -> None:
    object.__setattr__(disk.plan.seat, "tags", ())
    with pytest.raises(RefusedError, match="does not fit any more"):
        disk.restore()
    assert disk.qemu.reads == "now"


def test_another_disk_on_the_device(disk: Disk) -> None:
    disk.qemu.nodes["libvirt-9-format"] = {"driver": "qcow2", "node-name": "libvirt-9-format", "file": STORAGE}
    disk.qemu.drive = "libvirt-9-format"
    with pytest.raises(RefusedError, match="does not fit any more"):
        disk.restore()


def test_a_range_of_a_disk_that_was_written_to(again: Any) -> None:
    disk = again(quiet=True)
    disk.restore()
    disk.check_back()
    for change in ("guest", "host"):
        disk = again(quiet=True)
        if change == "guest":
            disk.qemu.written += 512
        else:
            os.utime(disk.files.overlay, ns=(1, 1))
        with pytest.raises(RefusedError, match="somebody wrote"):
            disk.restore()
        disk.check_settled("now")
        assert disk.qemu.status == "running"
