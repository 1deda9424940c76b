"""What the steps of saving and loading do."""

from __future__ import annotations

from dataclasses import asdict, replace

from hvctl.decide.archive import hardware_difference
from hvctl.decide.rebind import rebound, renamed
from hvctl.decide.reset import shape_difference
from hvctl.engine.applied import Applied
from hvctl.errors import NotFoundError, RefusedError, UnreachableError
from hvctl.model import archivesteps as a
from hvctl.model import plan as p
from hvctl.model.archive import Hardware
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm
from hvctl.ports import Host


def archive_hand(host: Host, step: p.Step, seen: Vm | None) -> Applied | None:
    """None: it is another one's step."""
    match step:
        case a.WriteArchive(vm_name, snapshot, hardware, folder):
            saved = host.archives.write(vm_name, snapshot, hardware, folder)
            return Applied(a.DropArchive(snapshot, folder), facts=asdict(saved))
        case a.PublishArchive(snapshot, folder):
            host.archives.publish(snapshot, folder)
            return Applied()
        case a.DropArchive(snapshot, folder):
            host.archives.drop(snapshot, folder)
            return Applied()
        case a.ImportSnapshot(snapshot, folder):
            stored = host.archives.import_snapshot(snapshot, folder)
            return Applied(a.RemoveImport(snapshot), facts={"bytes": stored})
        case a.RemoveImport(snapshot):
            host.archives.remove_import(snapshot)
            return Applied()
        case a.PlaceDisks(uuid, load, disks):
            _refuse_active(host, uuid)
            host.storage.place_disks(uuid, load, disks)
            return Applied(a.ReturnDisks(uuid, load, tuple(d.overlay for d in disks)))
        case a.ReturnDisks(uuid, load, overlays):
            if host.storage.kept_disks(uuid) == load:
                _refuse_active(host, uuid)
            host.storage.return_disks(uuid, load, overlays)
            return Applied()
        case a.ReleaseDisks(uuid, load, overlays):
            if host.storage.kept_disks(uuid) == load and not host.domains.get(uuid).state.active:
                raise UnreachableError("the QEMU process has ended before the load was valid.", "hvctl recover")
            host.storage.release_disks(uuid, load, overlays)
            return Applied()
        case a.BindSnapshot(snapshot, hardware):
            return _bind(host, seen or host.domains.get(snapshot.vm_uuid), snapshot, hardware)
        case _:
            return None


def _refuse_active(host: Host, uuid: str) -> None:
    """No overlay is taken away from a QEMU process."""
    try:
        vm = host.domains.get(uuid)
    except NotFoundError:
        return
    if vm.state.active:
        raise RefusedError(f"{vm.name} is {vm.state}: its disks are in use.", f"hvctl vm stop {vm.name}")


def _bind(host: Host, vm: Vm, snapshot: Snapshot, saved: Hardware) -> Applied:
    machine = host.machine
    now = machine.binding(vm)
    shape = [(r.name, r.size) for r in snapshot.regions], [(r.name, r.size) for r in vm.ram]
    memory = None if shape[0] == shape[1] else f"its memory was {shape[0]}, and is {shape[1]}"
    # A disk that was unplugged and plugged again had other names for its nodes than one that was there at the start.
    fitted = rebound(snapshot, renamed(snapshot.binding, now))
    difference = hardware_difference(saved, machine.hardware(vm)) or memory or shape_difference(fitted.binding, now)
    if difference:
        raise RefusedError(
            f"the saved snapshot {snapshot.name} does not fit {vm.name} any more: {difference}.",
            f"hvctl vm start {vm.name} boots it from its disks",
        )
    bound = replace(snapshot, binding=now, regions=vm.ram, targets=machine.nodes(vm))
    machine.attach(vm, bound)
    machine.publish(bound)
    return Applied(facts={"process": asdict(now.process)}, bound=bound)
