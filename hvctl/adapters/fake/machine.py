"""The inside of a fake QEMU process: snapshots are files and tags of the fake host, and every part of a guest carries
the moment it is of, so that a wrong order of steps shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hvctl import codec
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import RAM_BYTES, FakeVm, File, Part, World
from hvctl.errors import DeadlineError, GuestError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import State, Vm

TOUCHED_BY_LOAD = 8
HALF = RAM_BYTES


def _state_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/state"


def _ram_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/ram"


def _manifest_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/manifest.json"


def _process_of(world: World, vm: Vm) -> FakeVm:
    """The VM while the QEMU process that the caller saw is still there."""
    if vm.process is None:
        raise RefusedError(f"{vm.name} has no QEMU process.", f"hvctl vm start {vm.name}")
    inside = world.vms.get(vm.uuid)
    if inside is None or inside.process != vm.process:
        raise UnreachableError(f"the QEMU process {vm.process.pid} of {vm.name} is gone.", f"hvctl vm show {vm.name}")
    return inside


def _paused(world: World, vm: Vm, snapshot: Snapshot) -> FakeVm:
    """The VM while it is paused and the snapshot fits it."""
    inside = _process_of(world, vm)
    if inside.state is not State.PAUSED:
        raise RefusedError(f"{vm.name} is {inside.state}, not paused.", f"virsh suspend {vm.name}")
    if _binding(inside) != snapshot.binding:
        raise RefusedError(
            f"snapshot {snapshot.name} does not fit {vm.name} any more.",
            f"take a new one: hvctl snapshot take {vm.name}",
        )
    return inside


def _binding(inside: FakeVm) -> Binding:
    assert inside.process is not None
    devices = [f"cpu{i}" for i in range(len(inside.online))] + [n.mac for n in inside.nics] + inside.plugged
    devices += ["balloon"] if inside.has_balloon else []
    blocks = [f"{d.node}={d.path}" for d in inside.disks]
    return Binding(inside.process, tuple(sorted(devices)), tuple(sorted(blocks)))


class FakeMachine:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def binding(self, vm: Vm) -> Binding:
        with self._file.call("binding", vm.uuid, looks=True) as world:
            return _binding(_process_of(world, vm))

    def nodes(self, vm: Vm) -> tuple[str, ...]:
        with self._file.call("nodes", vm.uuid, looks=True) as world:
            disks = [d for d in _process_of(world, vm).disks if d.writable]
            for disk in disks:
                if disk.format != "qcow2" or not disk.node:
                    raise RefusedError(f"disk {disk.target} of {vm.name} is {disk.format}: it cannot hold a snapshot.")
            return tuple(str(d.node) for d in disks)

    def room(self, vm: Vm) -> tuple[int, int]:
        with self._file.call("room", vm.uuid, looks=True) as world:
            return _process_of(world, vm).allocation.memory, world.room

    def prepare(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("prepare", vm.uuid) as world:
            inside = _process_of(world, vm)
            world.files.setdefault(_state_path(snapshot), File())
            if snapshot.vmstate_node not in inside.nodes:
                inside.nodes.append(snapshot.vmstate_node)

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("save_state", vm.uuid) as world:
            inside = _paused(world, vm, snapshot)
            if snapshot.vmstate_node not in inside.nodes:
                raise HvctlError(f"{vm.name} has no node {snapshot.vmstate_node} for the device state.")
            world.files[_state_path(snapshot)] = File(_copy(inside.devices))
            for overlay in _overlays(world, inside):
                overlay.tags[snapshot.tag] = _copy(overlay.part)

    def copy_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        with self._file.call("copy_ram", vm.uuid) as world:
            half = Part(_paused(world, vm, snapshot).ram.text[:HALF])
            world.files[_ram_path(snapshot)] = File(half)
        # Two changes, so that a death in between leaves half a copy, as it does of real RAM.
        with self._file.change() as world:
            inside = _process_of(world, vm)
            world.files[_ram_path(snapshot)] = File(_copy(inside.ram))
            return len(inside.ram.text) // 2

    def publish(self, snapshot: Snapshot) -> None:
        with self._file.call("publish", snapshot.vm_uuid) as world:
            world.files[_manifest_path(snapshot)] = File(Part(codec.dump_json(snapshot).decode()))

    def restore_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        with self._file.call("restore_ram", vm.uuid) as world:
            inside = _paused(world, vm, snapshot)
            stored = _stored(world, snapshot)
            before = inside.ram.text
            if before != stored.text:
                inside.ram = Part(stored.text[:HALF] + before[HALF:], world.tick())
        with self._file.change() as world:
            _process_of(world, vm).ram = _copy(stored)
        pages = zip(bytes.fromhex(before), bytes.fromhex(stored.text), strict=False)
        return sum(a != b for a, b in pages)

    def load_state(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("load_state", vm.uuid) as world:
            inside = _paused(world, vm, snapshot)
            state = world.files.get(_state_path(snapshot))
            overlays = _overlays(world, inside)
            held = snapshot.vmstate_node in inside.nodes and all(snapshot.tag in o.tags for o in overlays)
            if state is None or not held:
                raise RefusedError(f"snapshot {snapshot.name} is damaged: {vm.name} does not hold all of it.")
            if inside.dead or inside.ram != _stored(world, snapshot):
                inside.dead = True
                raise GuestError(f"the state of {snapshot.name} could not be loaded: {vm.name} must not continue.")
            inside.devices = _copy(state.part)
            for overlay in overlays:
                overlay.part = _copy(overlay.tags[snapshot.tag])
            # The machine reset inside a load writes ROMs and tables into RAM.
            inside.ram = Part("f0" * TOUCHED_BY_LOAD + inside.ram.text[2 * TOUCHED_BY_LOAD :], world.tick())
            inside.agent_gap = inside.behaviour.agent_gap
            inside.guest_time = None
            inside.live = replace(inside.allocation, memory=snapshot.balloon)

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("restore_balloon", vm.uuid) as world:
            inside = _process_of(world, vm)
            if not inside.has_balloon or inside.allocation.memory == snapshot.balloon:
                return
            if not inside.behaviour.balloon_driver:
                raise DeadlineError(f"the balloon of {vm.name} did not reach {snapshot.balloon} bytes in time.")
            inside.live = replace(inside.allocation, memory=snapshot.balloon)

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        with self._file.call("drop", snapshot.vm_uuid) as world:
            world.files.pop(_manifest_path(snapshot), None)
            inside = world.vms.get(snapshot.vm_uuid)
            if inside and vm and snapshot.vmstate_node in inside.nodes:
                inside.nodes.remove(snapshot.vmstate_node)
            for overlay in _overlays(world, inside) if inside else ():
                overlay.tags.pop(snapshot.tag, None)
            folder = f"{snapshot.folder}/"
            world.files = {p: f for p, f in world.files.items() if not p.startswith(folder)}

    def snapshots(self, uuid: str | None = None) -> Sequence[Snapshot]:
        with self._file.call("snapshots", uuid, looks=True) as world:
            found = []
            for path, file in world.files.items():
                if not path.endswith("/manifest.json"):
                    continue
                try:
                    found.append(codec.load_json(Snapshot, file.part.text))
                except HvctlError:
                    continue
            return sorted((s for s in found if uuid in (None, s.vm_uuid)), key=lambda s: (s.created_at, s.id))


def _copy(part: Part) -> Part:
    return Part(part.text, part.moment)


def _overlays(world: World, inside: FakeVm) -> list[File]:
    return [world.files[d.path] for d in inside.disks if d.writable and d.path in world.files]


def _stored(world: World, snapshot: Snapshot) -> Part:
    stored = world.files.get(_ram_path(snapshot))
    if stored is None:
        raise NotFoundError(f"the RAM of snapshot {snapshot.name} is not there.", "hvctl snapshot list")
    return stored.part
