"""The meter of a fake host: its counters are data like everything else there, and time passes as the world says."""

from __future__ import annotations

import time

from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import FakeVm, World
from hvctl.errors import RefusedError
from hvctl.model.meter import DiskCounters, NicCounters, Reading, VmReading


class FakeMeter:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def read(self) -> Reading:
        with self._file.call("read_meter", looks=True) as world:
            world.libvirt_answers()
            clock = world.seconds if world.seconds is not None else time.monotonic()
            wall = world.wall if world.wall is not None else time.time()
            running = sorted((v for v in world.vms.values() if v.state.active), key=lambda v: v.name)
            return Reading(
                wall, clock, world.slow, world.facts.boot_id, tuple(_read(world, vm, clock) for vm in running)
            )

    def dirty_rate(self, uuid: str, seconds: int) -> int:
        with self._file.call("dirty_rate", uuid, looks=True) as world:
            world.libvirt_answers()
            vm = world.vm(uuid)
            if not vm.state.active:
                raise RefusedError(f"{vm.name} does not run.", f"hvctl vm start {vm.name}")
            return vm.used.dirty // seconds

    def available(self) -> int:
        with self._file.call("available", looks=True) as world:
            return world.available

    def lacks(self) -> tuple[str, ...]:
        return ("hardware counters (a fake host has no processor)",)

    def close(self) -> None:
        """Nothing is held between calls."""


def _read(world: World, vm: FakeVm, clock: float) -> VmReading:
    used, guest, memory = vm.used, vm.behaviour, vm.allocation.memory
    reports = vm.has_balloon and guest.balloon_driver and guest.balloon_stats
    free = max(0, memory - guest.used_memory)
    each = used.cpu // max(1, vm.allocation.vcpus)
    assert vm.process is not None
    return VmReading(
        uuid=vm.uuid,
        name=vm.name,
        life=f"{vm.process.pid}:{vm.process.start_time}:{vm.process.boot_id}",
        uptime=max(0.0, clock - vm.started) if world.seconds is not None else None,
        vcpus=vm.allocation.vcpus,
        cpu=used.cpu,
        vcpu_times=tuple((i, each) for i in range(vm.allocation.vcpus)),
        steal=used.steal,
        memory=memory,
        unused=max(0, free - guest.cache) if reports else None,
        available=memory if reports else None,
        usable=free if reports else None,
        rss=memory if used.resident is None else used.resident,
        disks=tuple(
            DiskCounters(d.target, used.reads, used.writes, used.read_bytes, used.write_bytes) for d in vm.disks
        ),
        nics=tuple(
            NicCounters(n.tap or "", used.rx_bytes, used.tx_bytes, used.rx_packets, used.tx_packets) for n in vm.nics
        ),
    )
