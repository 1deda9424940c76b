"""One disk of a VM back to a snapshot: where it sits is found, its image is prepared, and it is put in its place."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hvctl.adapters import diskseat, diskspare, diskswap
from hvctl.adapters.inside import Inside
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.vm import Disk, Vm


def prepare(
    held: Inside, vm: Vm, document: str, snapshot: Snapshot, target: str, range: Range | None, images: Path
) -> None:
    """document: libvirt's of the running VM. What fits already is left; what is begun has to be ended first."""
    disk = _disk(vm, target)
    overlay = Path(str(disk.path))
    if diskspare.begun(overlay):
        return
    seat = diskseat.find(diskseat.sight(held.qmp.execute_all(diskseat.QUESTIONS)), held.process, disk, document)
    extent = None if range is None else (range.start, range.end)
    known = diskspare.prepared(overlay)
    if known is None or not diskspare.fits(known, seat, snapshot.tag, extent):
        diskspare.prepare(held.qmp, seat, snapshot.tag, extent, [images])


def restore(held: Inside, vm: Vm, snapshot: Snapshot, target: str, range: Range | None) -> dict[str, float]:
    """Put in what was prepared; seconds. Repeatable from wherever it was interrupted."""
    overlay = Path(str(_disk(vm, target).path))
    plan = diskspare.prepared(overlay)
    extent = None if range is None else (range.start, range.end)
    if plan is None or (plan.tag, plan.extent) != (snapshot.tag, extent):
        raise RefusedError(f"nothing is prepared for disk {target} of {vm.name}.", "hvctl recover")
    done = diskswap.restore_disk(held.qmp, plan)
    held.forget()
    stages = {name: ms / 1000 for name, ms in done.stages}
    return {"away": done.away / 1000, "paused": done.paused / 1000, **stages}


def forget(overlays: Iterable[Path]) -> None:
    """After a snapshot was taken or deleted nothing that was prepared fits any more."""
    for overlay in overlays:
        with suppress(HvctlError, OSError):
            diskspare.forget(overlay)


def _disk(vm: Vm, target: str) -> Disk:
    for disk in vm.disks:
        if disk.target == target:
            return disk
    raise NotFoundError(f"{vm.name} has no disk {target}.", f"hvctl vm show {vm.name}")
