"""A swap of one disk against a model of QEMU's block nodes: killed before every step, refused at every command.

The files are real ones, and the model opens them as QEMU would: what is "open" is so in /proc.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.disks import diskseat, diskspare
from hvctl.adapters.disks.diskfiles import Files, identity
from hvctl.adapters.disks.diskseat import Seat
from hvctl.adapters.disks.diskspare import Plan
from hvctl.adapters.disks.diskswap import restore_disk
from hvctl.errors import GuestError, HvctlError, NotUndoneError, RefusedError
from hvctl.model.vm import Process

SIZE = 1 << 20
DEVICE = "/machine/peripheral/virtio-disk1/virtio-backend"
FORMAT, STORAGE = "libvirt-1-format", "libvirt-1-storage"
TAG = {"id": "1", "name": "hvctl-1", "date-sec": 1}
WHOLE = [
    *("keep", "add-away", "stop", "set-away", "del-format", "del-storage", "rename"),
    *("add-storage", "add-format", "set-back", "del-away"),
    *("query-block", "query-named-block-nodes", "cont", "clean"),
]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Qemu:
    """Block nodes, one device, and vCPUs that run or not; `refuse` holds commands that fail once, `broken` files that
    cannot be opened, `exported` a node that somebody else uses."""

    def __init__(self, overlay: Path) -> None:
        self.status = "running"
        self.drive = FORMAT
        self.nodes: dict[str, dict[str, Any]] = {}
        self.open: dict[str, int] = {}
        self.refuse: list[tuple[str, str]] = []
        self.broken: set[tuple[int, int]] = set()
        self.exported: str | None = None
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

    def _stop(self, a: dict[str, Any]) -> None:
        self.status = "paused"

    def _cont(self, a: dict[str, Any]) -> None:
        assert self.drive == FORMAT, "the guest would run without its disk"
        self.status = "running"

    def _blockdev_add(self, a: dict[str, Any]) -> None:
        name = a["node-name"]
        if name in self.nodes:
            raise GuestError("QEMU refuses blockdev-add: duplicate node name.")
        if a["driver"] == "file":
            if not Path(a["filename"]).exists() or identity(Path(a["filename"])) in self.broken:
                raise GuestError("QEMU refuses blockdev-add: could not open.")
            self.open[name] = os.open(a["filename"], os.O_RDWR)
        if a["driver"] == "qcow2" and a["file"] not in self.nodes:
            raise GuestError("QEMU refuses blockdev-add: cannot find its file.")
        self.nodes[name] = a

    def _blockdev_del(self, a: dict[str, Any]) -> None:
        name = a["node-name"]
        users = [n for n, node in self.nodes.items() if node.get("file") == name]
        if name not in self.nodes or name in (self.drive, self.exported) or users:
            raise GuestError("QEMU refuses blockdev-del: in use.")
        del self.nodes[name]
        if name in self.open:
            os.close(self.open.pop(name))

    def _qom_set(self, a: dict[str, Any]) -> None:
        assert (a["path"], a["property"]) == (DEVICE, "drive")
        if a["value"] not in self.nodes:
            raise GuestError("QEMU refuses qom-set: no such node.")
        self.drive = a["value"]

    def _query_status(self, a: dict[str, Any]) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def _query_block(self, a: dict[str, Any]) -> Any:
        return [{"qdev": DEVICE, "inserted": {"node-name": self.drive}}, {"device": "", "qdev": "cd"}]

    def _query_blockstats(self, a: dict[str, Any]) -> Any:
        return [{"qdev": DEVICE, "stats": {"wr_bytes": self.written, "rd_bytes": 7}}]

    def _query_named_block_nodes(self, a: dict[str, Any]) -> Any:
        return [shown(node, self.drive) for node in self.nodes.values()]

    @property
    def reads(self) -> str:
        """What the guest would read from its disk."""
        assert self.drive == FORMAT
        return os.pread(self.open[STORAGE], 100, 0).decode()


def shown(node: dict[str, Any], drive: str) -> dict[str, Any]:
    image: dict[str, Any] = {"format": node["driver"], "filename": "f", "actual-size": id(node) % 1000}
    if node["driver"] == "qcow2":
        image["snapshots"] = [TAG]
    iops = 5 if node["node-name"] == drive else 0
    cache = {"direct": False, "no-flush": True, "writeback": True}
    return {"node-name": node["node-name"], "drv": node["driver"], "image": image, "cache": cache, "iops": iops}


def storage(overlay: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(overlay), "node-name": STORAGE, "cache": {"no-flush": True}}


def format() -> dict[str, Any]:
    return {"driver": "qcow2", "file": STORAGE, "node-name": FORMAT, "cache": {"no-flush": True}}


class Disk:
    """An overlay that holds "now" and a spare that holds "then", ready for a reset."""

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.files = Files(folder / "extra.qcow2")
        self.files.overlay.write_text("now")
        self.qemu = Qemu(self.files.overlay)
        self.files.spare.write_text("then")
        nodes = [shown(n, FORMAT) for n in self.qemu.nodes.values()]
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
        self.files.plan.write_text("noted")
        self.qemu.log.clear()

    def restore(self, kill: str | None = None, *, pause: bool = True, names: list[str] | None = None) -> None:
        def at(step: str) -> None:
            if names is not None:
                names.append(step)
            if step == kill:
                raise Killed

        try:
            restore_disk(self.qemu, self.plan, pause=pause, at=at if kill or names is not None else None)  # type: ignore[arg-type]
        except Killed:
            return
        assert kill is None, f"there is no step {kill}"

    def check_back(self) -> None:
        self.check_settled("then")
        assert not self.files.spare.exists()

    def check_settled(self, content: str) -> None:
        """The disk is there with this content, as libvirt knows it, and nothing is left."""
        assert (self.qemu.reads, self.files.overlay.read_text()) == (content, content)
        assert set(self.qemu.nodes) == {FORMAT, STORAGE}
        assert self.qemu.nodes[FORMAT] == format()
        assert self.qemu.nodes[STORAGE] == storage(self.files.overlay)
        assert not self.files.old.exists()
        assert self.files.plan.exists() == (content == "then")


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


def test_done_is_done(disk: Disk) -> None:
    """What the guest wrote after a reset is not taken back by a repetition, and it is not paused for one."""
    disk.restore()
    os.pwrite(disk.qemu.open[STORAGE], b"more", 0)
    disk.qemu.log.clear()
    disk.restore()
    assert disk.qemu.reads == "more"
    assert not set(disk.qemu.log) - {"query-status", "query-block", "query-named-block-nodes"}


def test_a_paused_guest_stays_paused(disk: Disk) -> None:
    disk.qemu.status = "paused"
    disk.restore()
    disk.check_back()
    assert disk.qemu.status == "paused"
    assert "cont" not in disk.qemu.log


def test_without_a_pause_the_guest_never_stops(disk: Disk) -> None:
    disk.restore(pause=False)
    disk.check_back()
    assert "stop" not in disk.qemu.log


def test_a_threshold_of_libvirt_is_set_again(disk: Disk) -> None:
    disk.plan.seat.thresholds[STORAGE] = 4096
    seen: list[Any] = []
    disk.qemu._block_set_write_threshold = seen.append  # type: ignore[attr-defined]
    disk.restore()
    assert seen == [{"node-name": STORAGE, "write-threshold": 4096}]


# --- killed


@pytest.mark.parametrize("pause", [True, False])
def test_killed_before_every_step_and_repeated(again: Any, pause: bool) -> None:
    for step in WHOLE:
        if step in ("stop", "cont") and not pause:
            continue
        disk = again()
        disk.restore(kill=step, pause=pause)
        touched = WHOLE.index(step) > WHOLE.index("set-away")
        assert (disk.qemu.status == "paused") == (pause and "stop" in disk.qemu.log and step != "clean")
        if not touched:
            assert disk.qemu.reads == "now"
        disk.restore(pause=pause)
        disk.check_back()


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


# --- refused by QEMU


@pytest.mark.parametrize(
    ("command", "node"),
    [
        ("blockdev-add", "hvctl-away-vdb"),
        ("qom-set", "hvctl-away-vdb"),
        ("blockdev-del", FORMAT),
        ("blockdev-del", STORAGE),
        ("stop", ""),
    ],
)
@pytest.mark.parametrize("listened", [True, False])
def test_refused_before_the_file_changes(disk: Disk, command: str, node: str, listened: bool) -> None:
    """The guest goes on with the disk that it had."""
    disk.qemu.refuse.append((command, node))
    with pytest.raises(HvctlError, match="was not reset") as raised:
        disk.restore(names=[] if listened else None)
    assert not isinstance(raised.value, NotUndoneError)
    disk.check_settled("now")
    assert disk.qemu.status == "running"


@pytest.mark.parametrize("node", [FORMAT, STORAGE])
def test_a_node_that_somebody_else_uses(disk: Disk, node: str) -> None:
    disk.qemu.exported = node
    with pytest.raises(HvctlError, match="in use"):
        disk.restore()
    disk.check_settled("now")
    assert disk.qemu.status == "running"


@pytest.mark.parametrize(
    ("command", "node"), [("blockdev-add", STORAGE), ("blockdev-add", FORMAT), ("qom-set", FORMAT)]
)
@pytest.mark.parametrize("listened", [True, False])
def test_refused_after_the_file_changed(disk: Disk, command: str, node: str, listened: bool) -> None:
    """The old file takes its place again."""
    disk.qemu.refuse.append((command, node))
    with pytest.raises(HvctlError, match="was not reset") as raised:
        disk.restore(names=[] if listened else None)
    assert not isinstance(raised.value, NotUndoneError)
    disk.check_settled("now")
    assert disk.qemu.status == "running"


def test_a_spare_that_qemu_cannot_open(disk: Disk) -> None:
    disk.qemu.broken.add(disk.plan.spare)
    with pytest.raises(HvctlError, match="could not open"):
        disk.restore()
    disk.check_settled("now")
    assert disk.qemu.status == "running"


@pytest.mark.parametrize("pause", [True, False])
def test_no_file_can_be_opened_any_more(disk: Disk, pause: bool) -> None:
    """The guest never runs with a disk that is away; when the cause is gone, the same call ends it."""
    disk.qemu.broken |= {disk.plan.spare, identity(disk.files.overlay)}
    with pytest.raises(NotUndoneError, match="its guest is paused"):
        disk.restore(pause=pause)
    assert (disk.qemu.drive, disk.qemu.status) == ("hvctl-away-vdb", "paused")
    disk.qemu.broken.clear()
    with pytest.raises(RefusedError, match="does not fit any more"):
        disk.restore()
    disk.check_settled("now")


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


def test_a_node_that_came_back_otherwise_is_told(disk: Disk) -> None:
    disk.plan.seat.format["cache"] = {"no-flush": False}
    look = json.loads(disk.plan.seat.look)
    look[0]["cache"]["direct"] = True
    object.__setattr__(disk.plan.seat, "look", json.dumps(look, sort_keys=True))
    with pytest.raises(NotUndoneError, match="not as before"):
        disk.restore()
    assert disk.qemu.status == "paused"


def test_another_file_behind_the_nodes_is_told(disk: Disk) -> None:
    other = disk.files.overlay.with_name("other")
    other.write_text("what nobody prepared")
    disk.plan.seat.storage["filename"] = str(other)
    with pytest.raises(NotUndoneError, match="another file open"):
        disk.restore()
    assert disk.qemu.status == "paused"


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
