"""libvirt of a fake host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hvctl import codec
from hvctl.adapters.fake import agent, life
from hvctl.adapters.fake.document import document, redefine
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import FakeVm, World
from hvctl.errors import GuestError, NotFoundError, RefusedError
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.host import HostFacts
from hvctl.model.vm import Balloon, Disk, Nic, Region, State, Vm, VmSpec

DEFAULT_WEIGHT = 100


def observed(vm: FakeVm) -> Vm:
    nics = tuple(n if vm.state.active else replace(n, tap=None) for n in vm.nics)
    return Vm(
        uuid=vm.uuid,
        name=vm.name,
        state=vm.state,
        reason=vm.reason,
        accel=vm.accel,
        persistent=vm.persistent,
        process=vm.process,
        allocation=replace(vm.allocation, nics=tuple(NicLimit(n.mac) for n in vm.nics)),
        max_vcpus=vm.max_vcpus,
        max_memory=vm.max_memory,
        disks=tuple(vm.disks),
        nics=nics,
        record=vm.record,
        missing=tuple(vm.missing),
        monitor=vm.monitor,
        ram=(Region("pc.ram", f"{vm.folder}/ram", vm.max_memory),) if vm.state.active else (),
        has_balloon=vm.has_balloon,
        has_agent=vm.has_agent,
        agent_connected=vm.state.active and vm.behaviour.agent != "absent",
        pulse=f"{vm.folder}/pulse" if vm.has_pulse else None,
    )


def from_spec(spec: VmSpec) -> FakeVm:
    return FakeVm(
        uuid=spec.uuid,
        name=spec.name,
        folder=spec.folder,
        config=Allocation(spec.vcpus, spec.memory, disks=tuple(DiskLimit(d.target) for d in spec.disks)),
        max_vcpus=spec.max_vcpus,
        max_memory=spec.max_memory,
        accel=spec.accel,
        disks=[Disk(d.target, d.name, d.path, "qcow2", True, f"node-{d.target}") for d in spec.disks],
        nics=[Nic(n.mac, "virtio", n.bridge, n.tap) for n in spec.nics],
        record=spec.record,
        monitor=spec.monitor,
        has_pulse=spec.pulse is not None,
        kernel=spec.kernel,
        initrd=spec.initrd,
        cmdline=spec.cmdline,
    )


def set_allocation(vm: FakeVm, **parts: Any) -> None:
    """In force and in the definition, so that it holds after the next start too."""
    vm.config = replace(vm.config, **parts)
    if vm.live:
        vm.live = replace(vm.live, **parts)


class FakeDomains:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    @contextmanager
    def _call(self, name: str, uuid: str | None = None, *, looks: bool = False) -> Iterator[World]:
        with self._file.call(name, uuid, looks=looks) as world:
            world.libvirt_answers()
            yield world

    def facts(self) -> HostFacts:
        with self._call("facts", looks=True) as world:
            return replace(world.facts, uri=f"fake://{self._file.path}")

    def list(self) -> tuple[Vm, ...]:
        with self._call("list", looks=True) as world:
            return tuple(observed(v) for v in sorted(world.vms.values(), key=lambda v: v.name))

    def uuid(self, ref: str) -> str:
        with self._call("uuid", looks=True) as world:
            return world.vm(ref).uuid

    def get(self, ref: str) -> Vm:
        with self._call("get", ref, looks=True) as world:
            return observed(world.vm(ref))

    def define(self, spec: VmSpec) -> None:
        with self._call("define", spec.uuid) as world:
            if any(v.name == spec.name and v.uuid != spec.uuid for v in world.vms.values()):
                raise RefusedError(f"there is another VM named {spec.name}.", f"hvctl vm show {spec.name}")
            if spec.uuid not in world.vms:
                world.vms[spec.uuid] = from_spec(spec)

    def undefine(self, uuid: str) -> None:
        with self._call("undefine", uuid) as world:
            vm = world.vms.get(uuid)
            if vm and vm.state.active:
                raise RefusedError(f"{vm.name} is {vm.state}: an active VM stays defined.", f"hvctl vm stop {vm.name}")
            world.vms.pop(uuid, None)

    def start(self, uuid: str, *, paused: bool = False) -> None:
        with self._call("start", uuid) as world:
            vm = world.vm(uuid)
            if not vm.state.active:
                if paused and vm.saved:
                    raise RefusedError(f"a saved state of {vm.name} is held, and it would go on with it.")
                life.boot(world, vm, paused=paused)

    def shutdown(self, uuid: str) -> None:
        with self._call("shutdown", uuid) as world:
            vm = world.vm(uuid)
            if vm.state is State.RUNNING and not vm.behaviour.ignores_shutdown:
                life.halt(world, vm, "shutdown")

    def destroy(self, uuid: str) -> None:
        with self._call("destroy", uuid) as world:
            vm = world.vms.get(uuid)
            if vm and vm.state.active:
                life.halt(world, vm, "destroyed")

    def save(self, uuid: str) -> None:
        with self._call("save", uuid) as world:
            vm = world.vm(uuid)
            if vm.state.active:
                if not vm.persistent:
                    raise RefusedError(f"{vm.name} is transient: it cannot be saved.")
                life.save(world, vm)

    def pause(self, uuid: str) -> None:
        with self._call("pause", uuid) as world:
            life.pause(world.vm(uuid))

    def resume(self, uuid: str) -> None:
        with self._call("resume", uuid) as world:
            life.resume(world, world.vm(uuid))

    def wait_state(self, uuid: str, wanted: frozenset[State], seconds: float) -> State:  # noqa: ARG002
        """Nothing moves by itself in a fake world, so the state now is the state when the time is over."""
        with self._call("wait_state", uuid, looks=True) as world:
            return world.vm(uuid).state

    def set_vcpus(self, uuid: str, count: int) -> None:
        with self._call("set_vcpus", uuid) as world:
            vm = world.vm(uuid)
            if not 1 <= count <= vm.max_vcpus:
                raise RefusedError(f"{vm.name} can have 1 to {vm.max_vcpus} vCPUs, not {count}.")
            if not vm.live:
                set_allocation(vm, vcpus=count)
                return
            while len(vm.online) < count:
                vm.online.append(vm.behaviour.onlines_vcpus)
            while len(vm.online) > count and not vm.online[-1] and not vm.behaviour.keeps_vcpus:
                vm.online.pop()
            vm.live = replace(vm.live, vcpus=len(vm.online))
            if len(vm.online) > count:
                raise GuestError(f"the guest of {vm.name} keeps vCPU {len(vm.online) - 1}.", f"hvctl vm show {vm.name}")
            set_allocation(vm, vcpus=count)

    def set_cpu_quota(self, uuid: str, percent: int | None) -> None:
        with self._call("set_cpu_quota", uuid) as world:
            set_allocation(world.vm(uuid), cpu_quota=percent)

    def set_cpu_weight(self, uuid: str, weight: int | None) -> None:
        with self._call("set_cpu_weight", uuid) as world:
            set_allocation(world.vm(uuid), cpu_weight=None if weight == DEFAULT_WEIGHT else weight)

    def balloon(self, uuid: str) -> Balloon:
        with self._call("balloon", uuid, looks=True) as world:
            vm = world.vm(uuid)
            guest, actual = vm.behaviour, vm.allocation.memory
            if not (vm.live and vm.has_balloon and guest.balloon_driver and guest.balloon_stats):
                return Balloon(actual)
            free = max(0, actual - guest.used_memory)
            return Balloon(actual, total=actual, unused=free, usable=free, age=0.0)

    def set_balloon(self, uuid: str, target: int) -> int:
        with self._call("set_balloon", uuid) as world:
            vm = world.vm(uuid)
            if not 0 < target <= vm.max_memory or target % 1024:
                raise RefusedError(f"{vm.name} can have whole KiB up to {vm.max_memory} bytes, not {target}.")
            if vm.live and not vm.has_balloon:
                raise RefusedError(f"{vm.name} has no balloon device.", "stop it to change its memory")
            if vm.live and vm.behaviour.balloon_driver:
                floor = min(vm.behaviour.balloon_floor, vm.live.memory)
                vm.live = replace(vm.live, memory=max(target, floor))
                if vm.used.resident is not None:
                    vm.used.resident = min(vm.used.resident, vm.live.memory)
            if vm.live is None or vm.live.memory == target:
                set_allocation(vm, memory=target)
            return vm.allocation.memory

    def set_disk_limit(self, uuid: str, limit: DiskLimit) -> None:
        with self._call("set_disk_limit", uuid) as world:
            vm = world.vm(uuid)
            if all(d.target != limit.target for d in vm.disks):
                raise RefusedError(f"{vm.name} has no disk {limit.target}.", f"hvctl vm show {vm.name}")
            limits = (limit if d.target == limit.target else vm.allocation.disk(d.target) for d in vm.disks)
            set_allocation(vm, disks=tuple(limits))

    def set_record(self, uuid: str, record: Record | None) -> None:
        with self._call("set_record", uuid) as world:
            world.vm(uuid).record = record

    def xml(self, uuid: str) -> str:
        with self._call("xml", uuid, looks=True) as world:
            return document(world.vm(uuid))

    def redefine(self, uuid: str, xml: str) -> None:
        with self._call("redefine", uuid) as world:
            redefine(world.vm(uuid), xml)

    def disk_xml(self, uuid: str, target: str) -> str:
        with self._call("disk_xml", uuid, looks=True) as world:
            vm = world.vm(uuid)
            disk = next((d for d in vm.disks if d.target == target and vm.live), None)
            if disk is None:
                raise NotFoundError(f"{vm.name} runs without a disk {target}.", f"hvctl vm show {vm.name}")
            if disk.name == "root":
                raise RefusedError(f"disk {target} of {vm.name} is the root disk.")
            return codec.dump_json(vm.allocation.disk(target)).decode()

    def unplug_disk(self, uuid: str, target: str) -> None:
        with self._call("unplug_disk", uuid) as world:
            vm = world.vm(uuid)
            gone = [d for d in vm.disks if d.target == target]
            if not gone:
                return
            if vm.behaviour.keeps_disks or vm.state is not State.RUNNING or vm.live is None:
                vm.asked = True
                raise GuestError(f"the guest of {vm.name} did not let go of disk {target}.")
            vm.asked = False
            vm.disks = [d for d in vm.disks if d.target != target]
            vm.unplugged += gone
            vm.live = replace(vm.live, disks=tuple(d for d in vm.live.disks if d.target != target))

    def plug_disk(self, uuid: str, target: str, xml: str) -> None:
        with self._call("plug_disk", uuid) as world:
            vm = world.vm(uuid)
            back = [d for d in vm.unplugged if d.target == target]
            if not back or vm.live is None:
                return
            vm.unplugged = [d for d in vm.unplugged if d.target != target]
            come = replace(back[0], node=f"node-{target}-{world.tick()}")
            vm.disks = sorted([*vm.disks, come], key=lambda d: d.target)
            limits = (*vm.live.disks, codec.load_json(DiskLimit, xml))
            vm.live = replace(vm.live, disks=tuple(sorted(limits, key=lambda d: d.target)))
            # The guest has not written to it: it is of any moment.
            world.files[str(come.path)].part.moment = vm.devices.moment

    def agent(self, uuid: str, command: str, arguments: dict[str, Any], seconds: float) -> Any:  # noqa: ARG002
        with self._call("agent", uuid) as world:
            return agent.answer(world, world.vm(uuid), command, arguments)

    def console(self, uuid: str) -> str:
        with self._call("console", uuid, looks=True) as world:
            vm = world.vm(uuid)
            if vm.process is None:
                raise RefusedError(f"{vm.name} is off, so it has no console.", f"hvctl vm start {vm.name}")
            return f"/dev/pts/{vm.process.pid}"

    def close(self) -> None:
        """Nothing is held between calls."""
