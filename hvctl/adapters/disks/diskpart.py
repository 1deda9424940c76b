"""One disk of a VM back to a snapshot: where it sits is found, its image is prepared, and it is put in its place."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hvctl.adapters.disks import diskseat, diskspare, diskstandin, diskswap
from hvctl.adapters.disks.diskfiles import Files, has_open, identity, take_after
from hvctl.adapters.disks.disksettle import settle
from hvctl.adapters.disks.disksteps import Steps
from hvctl.adapters.kernel.awake import awake
from hvctl.adapters.kernel.urgency import urgent, urgent_process
from hvctl.adapters.qemu.inside import Inside
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.vm import Disk, Process, Vm


def prepare(
    held: Inside, vm: Vm, document: str, snapshot: Snapshot, target: str, range: Range | None, images: Path
) -> None:
    """document: libvirt's of the running VM. What fits already is left; what is begun has to be ended first."""
    disk = _disk(vm, target)
    overlay = Path(str(disk.path))
    known = diskspare.prepared(overlay)
    if diskspare.begun(overlay):
        if known is None or known.seat.life == held.process:
            return
        # The process ended in the middle of a reset: this one began with the image that is there.
        Files(overlay).remove()
        known = None
    seat = diskseat.find(Steps(held.qmp).look(), held.process, disk, document)
    extent = None if range is None else (range.start, range.end)
    if known is None or not diskspare.fits(known, seat, snapshot.tag, extent):
        diskspare.prepare(held.qmp, seat, snapshot.tag, extent, [images])


def restore(held: Inside, vm: Vm, snapshot: Snapshot, target: str, range: Range | None) -> dict[str, float]:
    """Put in what was prepared; seconds. Repeatable from wherever it was interrupted."""
    overlay = Path(str(_disk(vm, target).path))
    plan = diskspare.prepared(overlay)
    extent = None if range is None else (range.start, range.end)
    if plan is None or (plan.tag, plan.extent) != (snapshot.tag, extent):
        raise RefusedError(f"nothing is prepared for disk {target} of {vm.name}.", "hvctl recover")
    with awake(), urgent_process(held.process.pid), urgent():
        done = diskswap.restore_disk(held.qmp, plan)
    held.forget()
    stages = {name: ms / 1000 for name, ms in done.stages}
    return {"away": done.away / 1000, "paused": done.paused / 1000, **stages}


def is_back(held: Inside, vm: Vm, target: str) -> bool:
    """After an interrupted `restore`: whether it has ended, or came so far that it can only be ended forward."""
    plan = diskspare.prepared(Path(str(_disk(vm, target).path)))
    return plan is None or diskstandin.is_exchanged(plan, Steps(held.qmp).look())


def finish(held: Inside, vm: Vm, target: str) -> None:
    """End an interrupted `restore`. Until the exchange the guest may have gone on with its disk, long ago by now: then
    it keeps it as it is. After it the guest may have worked on the stand-in for as long, and keeps that."""
    overlay = Path(str(_disk(vm, target).path))
    plan = diskspare.prepared(overlay)
    if plan is None or not diskspare.begun(overlay):
        return
    steps = Steps(held.qmp)
    if diskstandin.is_exchanged(plan, steps.look()):
        settle(steps, plan)
    else:
        diskswap.withdraw(steps, plan)
    held.forget()


def revert(held: Inside, vm: Vm, snapshot: Snapshot, target: str) -> None:
    """The image of a disk that is unplugged is exchanged in one step, which also tells later that it was done."""
    overlay = Path(str(_disk(vm, target).path))
    plan, files = _whole(overlay, snapshot), Files(overlay)
    if plan is None or plan.spare not in files.places():
        raise RefusedError(f"nothing is prepared for disk {target} of {vm.name}.", "hvctl recover")
    if identity(overlay) != plan.spare:
        if has_open(held.process.pid, overlay):
            raise RefusedError(f"QEMU has the image of disk {target} of {vm.name} open.", "hvctl recover")
        take_after(overlay, files.spare)  # libvirt has changed that since the spare was made
        files.spare.replace(overlay)
    files.over(durable=plan.seat.flushes)


def is_reverted(vm: Vm, snapshot: Snapshot, target: str) -> bool:
    overlay = Path(str(_disk(vm, target).path))
    plan = _whole(overlay, snapshot)
    return plan is not None and identity(overlay) == plan.spare


def _whole(overlay: Path, snapshot: Snapshot) -> diskspare.Plan | None:
    """What was prepared, if it is for all of the disk at this snapshot."""
    plan = diskspare.prepared(overlay)
    return plan if plan is not None and (plan.tag, plan.extent) == (snapshot.tag, None) else None


def forget(overlays: Iterable[Path], process: Process | None) -> None:
    """After a snapshot was taken or deleted nothing that was prepared fits any more. process: QEMU's that runs now."""
    for overlay in overlays:
        plan = diskspare.prepared(overlay)
        with suppress(HvctlError, OSError):
            if plan is not None and plan.seat.life != process:
                Files(overlay).remove()
            else:
                diskspare.forget(overlay)


def _disk(vm: Vm, target: str) -> Disk:
    for disk in vm.disks:
        if disk.target == target:
            return disk
    raise NotFoundError(f"{vm.name} has no disk {target}.", f"hvctl vm show {vm.name}")
