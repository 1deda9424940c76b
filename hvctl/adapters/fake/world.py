"""The outside of a fake host: the guest at work, an administrator with virsh and tc, crashes and scripted failures."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvctl.adapters.fake import life
from hvctl.adapters.fake.domains import set_allocation
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import Behaviour, FakeVm, File, Script, Tap, Used, World
from hvctl.errors import HvctlError
from hvctl.model.allocation import Allocation, DiskLimit, Record
from hvctl.model.vm import Accel, Disk, Nic, State

MIB = 1 << 20


class FakeWorld:
    """Changes the state file as others than hvctl would. `vm` is a uuid or a name everywhere."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = WorldFile(self.path)

    @property
    def uri(self) -> str:
        return f"fake://{self.path}"

    def read(self) -> World:
        return self._file.read()

    def vm(self, vm: str) -> FakeVm:
        return self.read().vm(vm)

    def add_vm(
        self,
        name: str,
        *,
        uuid: str | None = None,
        running: bool = True,
        vcpus: int = 1,
        max_vcpus: int = 4,
        memory: int = 256 * MIB,
        max_memory: int = 1024 * MIB,
        disks: tuple[str, ...] = ("data",),
        nics: int = 1,
        accel: Accel = Accel.TCG,
        record: Record | None = None,
        missing: tuple[str, ...] = (),
        persistent: bool = True,
        behaviour: Mapping[str, Any] | None = None,
    ) -> str:
        """A VM that somebody made, its uuid. disks are serials of qcow2 overlays; nics are on the bridge br0."""
        uuid = uuid or str(uuids.uuid4())
        folder = f"/fake/vms/{uuid}"
        with self._file.change() as world:
            targets = [f"vd{chr(ord('a') + i)}" for i in range(len(disks))]
            vm = FakeVm(
                uuid=uuid,
                name=name,
                folder=folder,
                config=Allocation(vcpus, memory, disks=tuple(DiskLimit(t) for t in targets)),
                max_vcpus=max_vcpus,
                max_memory=max_memory,
                accel=accel,
                disks=[
                    Disk(target, serial, f"{folder}/{serial}.qcow2", "qcow2", True, f"node-{target}")
                    for target, serial in zip(targets, disks, strict=True)
                ],
                nics=[
                    Nic(f"52:54:00:{uuid[:2]}:{uuid[2:4]}:{i:02x}", "virtio", "br0", f"hv{uuid[:8]}-{i}")
                    for i in range(nics)
                ],
                record=record,
                monitor=f"{folder}/qmp",
                missing=list(missing),
                config_missing=list(missing),
                persistent=persistent,
                behaviour=Behaviour(**(behaviour or {})),
            )
            world.vms[uuid] = vm
            for disk in vm.disks:
                world.files[str(disk.path)] = File()
            if running:
                life.boot(world, vm)
        return uuid

    def add_vms(self, names: Iterable[str]) -> None:
        """Many running VMs at once: each has a disk and a NIC."""
        with self._file.change() as world:
            for name in names:
                uuid = str(uuids.uuid4())
                folder = f"/fake/vms/{uuid}"
                disk = Disk("vda", "data", f"{folder}/data.qcow2", "qcow2", True, "node-vda")
                nic = Nic(f"52:54:00:{uuid[:2]}:{uuid[2:4]}:00", "virtio", "br0", f"hv{uuid[:8]}-0")
                allocation = Allocation(1, 256 * MIB, disks=(DiskLimit("vda"),))
                vm = FakeVm(uuid, name, folder, allocation, 4, 1024 * MIB, disks=[disk], nics=[nic])
                world.vms[uuid] = vm
                world.files[str(disk.path)] = File()
                life.boot(world, vm)

    def spoil(self, vm: str, word: str = "spoiled") -> None:
        """The running guest works: other RAM, other device state and other content of every disk."""
        with self._file.change() as world:
            inside = world.vm(vm)
            if inside.state is not State.RUNNING:
                raise HvctlError(f"{inside.name} is {inside.state}: its guest does nothing.")
            for part in life.parts(world, inside)[1:]:
                part.text = f"{word} {world.tick()}"
            fresh = f"{word} {world.tick()}".encode().hex()
            inside.ram.text = (fresh * len(inside.ram.text))[: len(inside.ram.text)]

    def content(self, vm: str) -> dict[str, str]:
        """RAM, device state and each disk of a VM, to compare before and after."""
        world = self.read()
        inside = world.vm(vm)
        found = {"ram": inside.ram.text, "devices": inside.devices.text}
        return found | {d.target: world.files[d.path].part.text for d in inside.disks if d.path in world.files}

    def set_behaviour(self, vm: str, **behaviour: Any) -> None:
        with self._file.change() as world:
            inside = world.vm(vm)
            inside.behaviour = replace(inside.behaviour, **behaviour)

    def fail(self, call: str, error: str = "HvctlError", **script: Any) -> None:
        """Script a failure: see Script for nth, times, after and uuid."""
        self.script(call, error=error, **script)

    def script(self, call: str, **script: Any) -> None:
        with self._file.change() as world:
            world.scripts.append(Script(call, **script))

    def destroy(self, vm: str) -> None:
        """virsh destroy, or kill -9 of QEMU."""
        with self._file.change() as world:
            if world.vm(vm).state.active:
                life.halt(world, world.vm(vm), "destroyed")

    def start(self, vm: str) -> None:
        with self._file.change() as world:
            if not world.vm(vm).state.active:
                life.boot(world, world.vm(vm))

    def pause(self, vm: str, reason: str = "user") -> None:
        with self._file.change() as world:
            life.pause(world.vm(vm))
            world.vm(vm).reason = reason

    def resume(self, vm: str) -> None:
        with self._file.change() as world:
            life.resume(world, world.vm(vm))

    def undefine(self, vm: str) -> None:
        with self._file.change() as world:
            inside = world.vm(vm)
            inside.persistent = False
            if not inside.state.active:
                del world.vms[inside.uuid]

    def unplug_pulse(self, vm: str) -> None:
        """A VM without the port for signs of life."""
        with self._file.change() as world:
            world.vm(vm).has_pulse = False

    def say(self, vm: str, line: str) -> None:
        """The guest leaves a line in its port for the host."""
        with self._file.change() as world:
            world.vm(vm).said.append(line)

    def rename(self, vm: str, name: str) -> None:
        with self._file.change() as world:
            world.vm(vm).name = name

    def reboot_guest(self, vm: str) -> None:
        """The guest reboots inside the same QEMU process."""
        with self._file.change() as world:
            inside = world.vm(vm)
            moment = world.tick()
            for part in (inside.ram, inside.devices):
                part.text = f"{moment:08x}" * (len(part.text) // 8 or 1)

    def plug(self, vm: str, device: str) -> None:
        """Hot-plug a device that hvctl knows nothing of."""
        with self._file.change() as world:
            world.vm(vm).plugged.append(device)

    def allocate(self, vm: str, **parts: Any) -> None:
        """Change what is in force behind hvctl's back: fields of Allocation."""
        with self._file.change() as world:
            set_allocation(world.vm(vm), **parts)

    def add_tap(self, tap: str) -> None:
        """A tap of no VM."""
        with self._file.change() as world:
            world.taps[tap] = Tap()

    def remove_tap(self, tap: str) -> None:
        with self._file.change() as world:
            del world.taps[tap]

    def put_foreign_qdisc(self, tap: str, qdisc: str = "htb 1: root") -> None:
        with self._file.change() as world:
            world.taps[tap].foreign = qdisc

    def drop_qdisc(self, tap: str) -> None:
        """Everything on the tap goes, whoever put it there."""
        with self._file.change() as world:
            world.taps[tap] = Tap(world.taps[tap].uuid)

    def queue(self, tap: str, packets: int) -> None:
        """Packets for the guest arrive that it does not take."""
        with self._file.change() as world:
            world.taps[tap].waiting += packets

    def add_address(self, tap: str, address: str, disputed: bool = False) -> None:
        """The guest has an address, or (disputed) claims one that is another's."""
        with self._file.change() as world:
            device = world.taps[tap]
            (device.disputed if disputed else device.addresses).append(address)

    def add_flow(self, source: str, destination: str) -> None:
        with self._file.change() as world:
            world.flows = [*(world.flows or []), [source, destination]]

    def corrupt(self, path: str) -> None:
        """Spoil a file of the host, such as a snapshot's manifest."""
        with self._file.change() as world:
            world.files[path].part.text = "{"

    def remove(self, folder: str) -> None:
        """Everything in a folder of the host."""
        with self._file.change() as world:
            world.files = {p: f for p, f in world.files.items() if not p.startswith(f"{folder}/")}

    def work(self, vm: str, **used: int) -> None:
        """A running VM uses so much more: fields of Used."""
        with self._file.change() as world:
            counters = world.vm(vm).used
            for name, more in used.items():
                setattr(counters, name, getattr(counters, name) + more)

    def set_used(self, vm: str, used: Used) -> None:
        with self._file.change() as world:
            world.vm(vm).used = used

    def pass_time(self, seconds: float, jump: float = 0.0) -> None:
        """Both clocks go on, from a start of the world's own; the wall clock jumps in addition."""
        with self._file.change() as world:
            world.seconds = (1000.0 if world.seconds is None else world.seconds) + seconds
            world.wall = (1_800_000_000.0 if world.wall is None else world.wall) + seconds + jump

    def set_slow(self, seconds: float) -> None:
        with self._file.change() as world:
            world.slow = seconds

    def set_room(self, room: int) -> None:
        with self._file.change() as world:
            world.room = room

    def add_bridge(self, name: str) -> None:
        """Beside br0, which is there."""
        with self._file.change() as world:
            world.bridges.append(name)

    def set_libvirt_down(self, down: bool) -> None:
        with self._file.change() as world:
            world.libvirt_down = down

    def reboot_host(self) -> None:
        """Every QEMU process, tap and ifb is gone, and so are the snapshots, which live on tmpfs; what is on disks
        stays."""
        with self._file.change() as world:
            world.facts = replace(world.facts, boot_id=f"boot-{world.tick()}")
            for vm in list(world.vms.values()):
                if vm.state.active:
                    life.halt(world, vm, "crashed")
            world.ifbs = {}
            gone = {folder for folder, _, name in (p.rpartition("/") for p in world.files) if name in ("ram", "state")}
            world.files = {p: f for p, f in world.files.items() if p.rpartition("/")[0] not in gone}
