"""snapshot save, load and diff: a snapshot on a disk, a VM back from it after its host, and what two snapshots differ
in."""

from __future__ import annotations

import os
import uuid as uuids
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvctl.adapters.libvirt.domainxml_read import board
from hvctl.adapters.probes.ramdir import filesystem
from hvctl.decide.archive import plan_load, plan_save, refuse_load
from hvctl.decide.reset import after_reset, binding_difference
from hvctl.engine.operate import Decision, Engine
from hvctl.engine.runtime import open_host
from hvctl.errors import NotFoundError, UsageError
from hvctl.model.archive import Archive, Difference, Hardware
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm
from hvctl.operations.snapshot import NAME, find
from hvctl.settings import Settings

IN_MEMORY = ("tmpfs", "ramfs")


def save(engine: Engine, ref: str, name: str, folder: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Save a snapshot in a new folder; its guest runs on."""
    place = absolute(folder)

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        snapshot = find(engine, vm, name)
        if vm.process is None:
            return Refusal(
                f"{vm.name} is {vm.state}: a snapshot is saved while its QEMU process is there.",
                f"hvctl vm start {vm.name}",
            )
        machine = engine.host.machine
        difference = binding_difference(snapshot.binding, machine.binding(vm))
        if difference:
            return Refusal(
                f"{snapshot.name} does not fit {vm.name} any more: {difference}.",
                f"take a new one: hvctl snapshot take {vm.name}",
            )
        if os.path.lexists(place):
            return Refusal(f"{place} is there already.", "name a folder that is not there yet")
        room = engine.host.archives.room(snapshot, place)
        plan = plan_save(vm, snapshot, machine.hardware(vm), place, room)
        if isinstance(plan, Refusal):
            return plan
        kind = filesystem(Path(place).parent)
        if kind in IN_MEMORY:
            plan = replace(plan, reasons=(f"on {kind}: it does not outlive a restart of the host",))
        before = Before(vm=vm, snapshot=snapshot, archive=place)
        return Decision(plan, before, result={"snapshot": snapshot.name, "id": snapshot.id, "to": place})

    if dry_run:
        return engine.preview(Kind.SNAPSHOT_SAVE, ref, ref, decide)
    return engine.change(Kind.SNAPSHOT_SAVE, ref, {"name": name, "to": place}, decide, key=key)


def load(
    engine: Engine, ref: str, folder: str, name: str | None = None, *, dry_run: bool = False, key: str | None = None
) -> Outcome:
    """Bring a VM that is off back to a saved snapshot in a new QEMU process, with what was promised then, if the host
    has room. It has the snapshot then, and can be reset to it."""
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name for a snapshot.", "use letters, digits and . _ -, at most 63")
    place = absolute(folder)

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        if vm.protected:
            return Refusal(
                f"{vm.name} is protected: a load throws away what its disks hold.", f"hvctl vm protect {vm.name} --off"
            )
        archive = engine.host.archives.read(place)
        return _refused(engine, vm, archive) or _decide_load(engine, vm, archive, place, name)

    request = {"from": place, "name": name}
    if dry_run:
        return engine.preview(Kind.SNAPSHOT_LOAD, ref, ref, decide)
    return engine.change(Kind.SNAPSHOT_LOAD, ref, request, decide, key=key)


def _refused(engine: Engine, vm: Vm, archive: Archive) -> Refusal | None:
    host = engine.host
    machine, cpu, devices = board(host.domains.xml(vm.uuid))
    defined = Hardware(engine.facts.hypervisor_version, machine, vm.accel.value, cpu, "", devices)
    # Only those that the VM has: what an archive names is nothing to open.
    own = [d.path for d in vm.disks if d.writable and d.path in archive.overlays and d.path]
    backings = {path: host.archives.backing(path) for path in own}
    return refuse_load(vm, archive, defined, backings)


def _decide_load(engine: Engine, vm: Vm, archive: Archive, place: str, name: str | None) -> Decision | Refusal:
    host = engine.host
    snapshot = _planned(engine, vm, archive, name)
    record = after_reset(vm, snapshot)
    load = uuids.uuid4().hex[:12]
    # Those that build on others first.
    stale = tuple(reversed(host.machine.snapshots(vm.uuid, hidden=True)))
    rooms = host.archives.load_rooms(archive)
    plan = plan_load(vm, archive, snapshot, record, place, load, stale, rooms)
    if isinstance(plan, Refusal):
        return plan
    before = Before(vm=vm, goal=record, snapshot=snapshot, was_running=True, holds=True, archive=place, load=load)
    result = {"snapshot": snapshot.name, "id": snapshot.id, "from": place, "warmth": "cold"}
    return Decision(plan, before, goal=record, holds=True, result=result)


def _planned(engine: Engine, vm: Vm, archive: Archive, name: str | None) -> Snapshot:
    """The snapshot as it will be here: complete in itself, in this host's folders. Its process comes when it starts."""
    saved = archive.snapshot
    folder = engine.settings.snapshots_dir / vm.uuid / saved.id
    return replace(saved, name=name or saved.name, folder=str(folder), parent=None, hidden=False, stored=0)


def difference(settings: Settings, ref: str, one: str, other: str) -> Difference:
    """Where the RAM and the disks of two snapshots differ. Nothing is changed."""
    host = open_host(settings)
    try:
        vm = host.domains.get(ref)
        taken = host.machine.snapshots(vm.uuid)
        return host.machine.difference(_named(vm, taken, one), _named(vm, taken, other))
    finally:
        host.domains.close()


def _named(vm: Vm, taken: Sequence[Snapshot], name: str) -> Snapshot:
    for snapshot in taken:
        if name in (snapshot.name, snapshot.id):
            return snapshot
    raise NotFoundError(f"{vm.name} has no snapshot {name}.", f"hvctl snapshot list {vm.name}")


def absolute(folder: str) -> str:
    """The folder by its whole name; what it is called itself must not be a link."""
    path = Path(folder).absolute()
    if not path.name or path.name in (".", "..") or not str(path).isprintable():
        raise UsageError(f"{folder!r} does not name a folder.", "--to /var/backups/ci-1-clean")
    try:
        parent = path.parent.resolve(strict=True)
    except OSError as e:
        raise UsageError(f"the folder {path.parent} is not there.", f"mkdir -p {path.parent}") from e
    return str(parent / path.name)
