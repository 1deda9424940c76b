"""One disk of a VM back to a snapshot: where it sits is found, its image is prepared, and it is put in its place."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hvctl.adapters.disks import diskseat, diskspare, diskswap
from hvctl.adapters.disks.diskfiles import Files, identity
from hvctl.adapters.disks.diskseat import Sight
from hvctl.adapters.disks.diskspare import Plan
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
    seat = diskseat.find(_sight(held), held.process, disk, document)
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
    return plan is None or _is_away(plan, _sight(held))


def finish(held: Inside, vm: Vm, target: str) -> None:
    """End an interrupted `restore`. Until the disk was away the guest may have gone on with it, long ago by now: then
    it keeps it as it is."""
    overlay = Path(str(_disk(vm, target).path))
    plan = diskspare.prepared(overlay)
    if plan is None or not diskspare.begun(overlay):
        return
    seen = _sight(held)
    if _is_away(plan, seen):
        diskswap.restore_disk(held.qmp, plan)
    else:
        if plan.seat.away in seen.nodes:
            held.qmp.execute("blockdev-del", {"node-name": plan.seat.away})
        Files(overlay).over(durable=False)
    held.forget()


def _sight(held: Inside) -> Sight:
    return diskseat.sight(held.qmp.execute_all(diskseat.QUESTIONS))


def _is_away(plan: Plan, seen: Sight) -> bool:
    """Whether the disk was taken away from the guest, or has the new image already."""
    taken = seen.devices.get(plan.seat.device) == plan.seat.away
    return taken or identity(Path(plan.seat.path)) == plan.spare


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
