"""What happens to a fake VM when its QEMU process starts, ends, stops and continues, whoever asked for it."""

from __future__ import annotations

import hashlib

from hvctl.adapters.fake.state import RAM_BYTES, FakeVm, Part, Saved, Tap, Used, World
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.vm import Process, State


def parts(world: World, vm: FakeVm) -> list[Part]:
    """RAM, device state and writable disks: what must be of one moment when the guest runs."""
    disks = [world.files[d.path].part for d in vm.disks if d.writable and d.path in world.files]
    return [vm.ram, vm.devices, *disks]


def plug_all(vm: FakeVm) -> None:
    """The definition has kept the disks that were taken from the running guest."""
    vm.disks = sorted([*vm.disks, *vm.unplugged], key=lambda d: d.target)
    vm.unplugged, vm.asked = [], False


def boot(world: World, vm: FakeVm, *, paused: bool = False) -> None:
    """Start a QEMU process; its RAM and device state are new, its disks are what they were. paused: its guest has not
    run yet."""
    for disk in vm.disks:
        if disk.path not in world.files:
            raise HvctlError(f"{vm.name} cannot start: its disk {disk.path} is not there.", f"hvctl vm show {vm.name}")
    life = world.tick()
    vm.process = Process(life, life * 100, world.facts.boot_id)
    vm.live = vm.config
    vm.missing = list(vm.config_missing)
    vm.state, vm.reason = State.RUNNING, "booted"
    seed = hashlib.sha256(f"{vm.uuid} {life}".encode()).hexdigest()
    vm.ram.text = (seed * (RAM_BYTES // 32))[: RAM_BYTES * 2]
    vm.devices.text = f"booted {life}"
    vm.online = [True] * vm.config.vcpus
    vm.dead, vm.agent_gap, vm.exits, vm.greeted = False, 0, {}, False
    vm.tracking, vm.prepared = None, {}
    vm.used, vm.started = Used(), world.seconds or 0.0
    if vm.saved is not None:
        vm.ram, vm.devices, vm.live, vm.online = vm.saved.ram, vm.saved.devices, vm.saved.live, vm.saved.online
        vm.saved, vm.reason = None, "restored"
    for nic in vm.nics:
        if nic.tap:
            world.taps[nic.tap] = Tap(vm.uuid)
    if paused:
        vm.state, vm.reason = State.PAUSED, "user"
        vm.ram.moment = vm.devices.moment = world.tick()
        return
    _run(world, vm)


def save(world: World, vm: FakeVm) -> None:
    if vm.state is not State.RUNNING or vm.live is None:
        raise RefusedError(f"{vm.name} is {vm.state}, so it cannot be saved.", f"hvctl vm show {vm.name}")
    saved = Saved(vm.ram, vm.devices, vm.live, vm.online)
    halt(world, vm, "saved")
    vm.saved = saved


def halt(world: World, vm: FakeVm, reason: str) -> None:
    """The QEMU process is gone: its taps and block nodes with it, its ifbs and files not."""
    vm.state, vm.reason, vm.process, vm.live = State.OFF, reason, None, None
    vm.ram, vm.devices = Part(), Part()
    plug_all(vm)
    vm.nodes, vm.plugged, vm.online, vm.missing = [], [], [], list(vm.config_missing)
    world.taps = {name: tap for name, tap in world.taps.items() if tap.uuid != vm.uuid}
    if not vm.persistent:
        del world.vms[vm.uuid]


def pause(vm: FakeVm) -> None:
    if vm.state is State.RUNNING:
        vm.state, vm.reason = State.PAUSED, "user"
    elif vm.state is not State.PAUSED:
        raise RefusedError(f"{vm.name} is {vm.state}, so it cannot be paused.", f"hvctl vm start {vm.name}")


def resume(world: World, vm: FakeVm) -> None:
    if vm.state is State.RUNNING:
        return
    if vm.state is not State.PAUSED:
        raise RefusedError(f"{vm.name} is {vm.state}, so it cannot continue.", f"hvctl vm start {vm.name}")
    if vm.dead or len({p.moment for p in parts(world, vm)}) > 1:
        vm.torn = True
    vm.state, vm.reason = State.RUNNING, "unpaused"
    _run(world, vm)


def _run(world: World, vm: FakeVm) -> None:
    moment = world.tick()
    vm.ram_of = None
    for part in parts(world, vm):
        part.moment = moment
