"""Prepares the reset of one disk: a pristine copy of its overlay at a snapshot, the spare that takes its place, and the
stand-in for the time between.

Everything slow is done here, before QEMU is touched: the reset itself opens the stand-in and renames the spare over the
overlay. What was prepared stands in a small file, so that a reset which was interrupted can be ended by whoever comes
next.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.disks import diskseat
from hvctl.adapters.disks.diskfiles import Files, check_folder, copy, identity, sync, take_after
from hvctl.adapters.disks.diskseat import Seat
from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.qemu.qmp import Qmp
from hvctl.errors import HvctlError, RefusedError

SECTOR: Final = 512
# Counters of a device that move when a guest changes its disk.
_WRITES = ("wr_bytes", "wr_operations", "unmap_bytes", "unmap_operations", "failed_wr_operations")


@dataclass(frozen=True, slots=True)
class Plan:
    """A reset that is prepared: the disk `seat` to the snapshot `tag`, all of it or the bytes of extent (start, end).
    spare is the device and inode number of the file that will be the overlay; quiet, of an extent, what stays the same
    as long as nobody writes to the disk."""

    seat: Seat
    tag: str
    extent: tuple[int, int] | None
    spare: tuple[int, int]
    quiet: str | None


def prepare(
    qmp: Qmp, seat: Seat, tag: str, extent: tuple[int, int] | None = None, folders: Collection[Path] = ()
) -> Plan:
    """Make everything ready for diskswap.restore_disk; the disk stays as it is. A pristine copy that fits is used.

    The guest runs on, apart from two pauses of milliseconds where a copy of the live overlay is needed; only if it
    writes to the disk meanwhile it is paused for as long as such a copy takes. extent: bytes, multiples of 512, and
    `folders` those that the disk's images may lie in. RefusedError: there is no such snapshot or extent, or the
    overlay's folder is not safe; HvctlError: no room.
    """
    files = Files(Path(seat.path))
    check_folder(files.overlay.parent)
    refuse_begun(files)
    _check_wanted(seat, tag, extent)
    files.drop_plan()
    with _host_errors(files.overlay):
        pristine = _pristine(qmp, seat, tag, files)
        if extent is None:
            quiet = None
            copy(pristine, files.spare, durable=seat.flushes)
            os.link(pristine, files.backing, follow_symlinks=False)
        else:
            quiet = _copy_live(qmp, seat, files.spare)
            qemuimg.copy_extent(pristine, files.spare, *extent, [files.overlay.parent, *folders])
            qemuimg.check(files.spare)
            if seat.flushes:
                sync(files.spare)
            copy(files.spare, files.backing)
        files.backing.chmod(0o600)  # as long as nothing needs it: every QEMU may know this name
        qemuimg.create_empty(files.standin, seat.size)
        take_after(files.overlay, files.spare)
        plan = Plan(seat, tag, extent, identity(files.spare), quiet)
        replace_file(files.plan, codec.dump_json(plan).decode())
    return plan


def prepared(overlay: Path) -> Plan | None:
    """What was prepared for this overlay, begun or done last; None if nothing was, or it cannot be trusted."""
    try:
        fd = os.open(Files(overlay).plan, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        try:
            plan = codec.load_json(Plan, stream.read())
        except HvctlError:
            return None
    return plan if plan.seat.path == str(overlay) else None


def fits(plan: Plan, seat: Seat, tag: str, extent: tuple[int, int] | None = None) -> bool:
    """Whether what was prepared is this reset. An extent's is not: the rest of the disk may have changed since."""
    if (plan.tag, plan.extent, extent) != (tag, None, None) or plan.seat != seat:
        return False
    files = Files(Path(seat.path))
    with suppress(OSError):
        return identity(files.spare) == plan.spare and files.standin.exists() and files.backing.exists()
    return False


def begun(overlay: Path) -> bool:
    """Whether a reset of this disk was interrupted after it touched the disk: it has to be ended by restore_disk."""
    files = Files(overlay)
    return files.old.exists() and files.plan.exists()


def forget(overlay: Path) -> None:
    """Remove all files of this overlay's resets: after a snapshot was taken or deleted none of them fits any more, and
    they hold what the guest wrote. Absent already is fine; RefusedError while a reset is begun."""
    files = Files(overlay)
    refuse_begun(files)
    files.remove()


def refuse_begun(files: Files) -> None:
    if begun(files.overlay):
        raise RefusedError(f"a reset of the disk {files.overlay} was interrupted.", "hvctl recover")


def quiet_mark(stats: Any, seat: Seat) -> str:
    """What stays the same as long as nobody writes to the disk, from the answer to query-blockstats: the guest's
    writes are counted there, everybody else's move the file's time."""
    counters = next(s["stats"] for s in stats if s.get("qdev") in (seat.device, seat.device.rpartition("/")[2]))
    status = Path(seat.path).stat()
    return json.dumps([[counters.get(key) for key in _WRITES], status.st_mtime_ns, status.st_size])


def _check_wanted(seat: Seat, tag: str, extent: tuple[int, int] | None) -> None:
    if tag not in seat.tag_names:
        raise RefusedError(f"disk {seat.target} does not hold the snapshot {tag}.", "hvctl snapshot list")
    if extent is None:
        return
    start, end = extent
    if not 0 <= start < end <= seat.size:
        raise RefusedError(
            f"disk {seat.target} has {seat.size} bytes: {start} to {end} is not a range of it.", "virsh domblkinfo"
        )
    if start % SECTOR or end % SECTOR:
        near = start // SECTOR * SECTOR, min(-(-end // SECTOR) * SECTOR, seat.size)
        raise RefusedError(
            f"the range {start} to {end} of disk {seat.target} is not made of whole sectors of {SECTOR} bytes.",
            f"the sectors that it touches are --only disk:{seat.target}:{near[0]}-{near[1]}",
        )


def _pristine(qmp: Qmp, seat: Seat, tag: str, files: Files) -> Path:
    """A copy of the overlay whose active state is the snapshot and that holds all snapshots the overlay holds."""
    pristine = files.pristine(tag)
    if pristine.exists():
        found = qemuimg.info(pristine, "qcow2")
        shape = diskseat.tags(found), found["virtual-size"], found.get("backing-filename")
        if shape == (seat.tags, seat.size, seat.backing):
            return pristine
    partial = pristine.with_name(f"{pristine.name}.partial")
    _copy_live(qmp, seat, partial)
    qemuimg.apply_internal_snapshot(partial, tag)
    qemuimg.check(partial)
    if seat.flushes:
        sync(partial)
    partial.replace(pristine)
    return pristine


def _copy_live(qmp: Qmp, seat: Seat, target: Path) -> str:
    """Copy the overlay as it is at one moment; what stays the same as long as nobody writes to the disk."""
    overlay = Path(seat.path)
    # Pausing makes QEMU write its metadata to the file, and waits for what the guest is writing.
    running = qmp.execute("query-status")["running"]

    def settle() -> str:
        if not running:
            return quiet_mark(qmp.execute("query-blockstats"), seat)
        return quiet_mark(qmp.execute_all([("stop", {}), ("query-blockstats", {}), ("cont", {})])[1], seat)

    before = settle()
    copy(overlay, target)
    if settle() == before:
        return before
    if not running:
        raise RefusedError(f"somebody else writes to the overlay of disk {seat.target} ({overlay}).", "lsof shows who")
    qmp.execute("stop")
    try:
        copy(overlay, target)
        return quiet_mark(qmp.execute("query-blockstats"), seat)
    finally:
        qmp.execute("cont")


@contextmanager
def _host_errors(overlay: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise HvctlError(
            f"a copy of the disk {overlay} cannot be made: {e.strerror}.", f"df -h {overlay.parent}"
        ) from e
