"""The rest of the world around a host under test: who makes VMs, works inside them, and breaks things from outside."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Accel, DiskSpec, NicSpec, Vm, VmSpec
from hvctl.ports import Host

BOTH = ["fake", pytest.param("real", marks=pytest.mark.host)]
MIB = 1 << 20
_numbers = itertools.count(1)


def next_number() -> int:
    return next(_numbers)


class Outside(Protocol):
    """What tests do to a host without its ports."""

    host: Host

    def spec(self) -> VmSpec:
        """A VM that this host can run, named and numbered for this test alone."""
        ...

    def await_guest(self, vm: str) -> None:
        """The guest has booted and its agent answers."""
        ...

    def await_vcpus(self, vm: str, count: int) -> None:
        """The guest's own kernel runs on that many vCPUs; fails if it does not come to it."""
        ...

    def spoil(self, vm: str) -> None:
        """The guest works: its RAM and its disk change."""
        ...

    def content(self, vm: str) -> Mapping[str, str]:
        """What spoil changes, as it is now."""
        ...

    def acknowledge(self, vm: str, notice: str) -> None:
        """The guest says on its port that it is ready for the interruption with this id."""
        ...

    def kill(self, vm: Vm) -> None:
        """The QEMU process dies and libvirt knows it."""
        ...

    def alive(self, vm: Vm) -> bool:
        """Whether the process that `vm` was seen with is there."""
        ...

    def exists(self, path: str) -> bool: ...

    def size(self, path: str) -> tuple[int, int]:
        """What tells a file from another one put in its place, and its length."""
        ...

    def corrupt(self, path: str) -> None: ...

    def remove_archive(self, folder: str) -> None:
        """A saved snapshot is its owner's to remove; absent already is fine."""
        ...

    def snapshot(self, vm: Vm, name: str) -> Snapshot:
        """What a snapshot of this VM would be, taken now."""
        ...


@contextmanager
def made(outside: Outside, spec: VmSpec, *, start: bool = False) -> Iterator[str]:
    """A VM, booted if asked; whatever becomes of it, nothing of it is left."""
    try:
        outside.host.storage.make_disks(spec)
        outside.host.domains.define(spec)
        if start:
            outside.host.domains.start(spec.uuid)
            outside.await_guest(spec.uuid)
        yield spec.uuid
    finally:
        _unmake(outside.host, spec.uuid)


def _unmake(host: Host, vm: str) -> None:
    """Each step is tried, whatever becomes of those before it."""
    with ExitStack() as steps:
        steps.callback(host.storage.remove, vm)
        steps.callback(host.domains.undefine, vm)
        steps.callback(host.network.clear, vm)
        steps.callback(host.domains.destroy, vm)
        found = next((v for v in host.domains.list() if v.uuid == vm and v.state.active), None)
        for snapshot in host.machine.snapshots(vm):
            steps.callback(host.machine.drop, found, snapshot)


def numbered_snapshot(host: Host, vm: Vm, name: str, folder: Path) -> Snapshot:
    """Snapshots get later times in the order they are asked for."""
    number = next_number()
    id = f"{number:08x}"
    return Snapshot(
        id=id,
        name=name,
        vm_uuid=vm.uuid,
        created_at=f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z",
        binding=host.machine.binding(vm),
        tag=f"hvctl-{id}",
        targets=host.machine.nodes(vm),
        vmstate_node=f"hvctl-{id}",
        folder=str(folder / vm.uuid / id),
        regions=vm.ram,
        balloon=vm.allocation.memory,
        vcpus=vm.allocation.vcpus,
        stored=0,
    )


class FakeOutside:
    def __init__(self, folder: Path) -> None:
        self.world = FakeWorld(folder / "state.json")
        self.host = open_fake(self.world.uri)

    def check_nothing_left(self) -> None:
        left = self.world.read()
        assert (left.vms, left.files, left.folders, left.taps, left.ifbs) == ({}, {}, {}, {}, {})

    def spec(self) -> VmSpec:
        number, id = next_number(), str(uuid.uuid4())
        folder = f"/fake/vms/{id}"
        return VmSpec(
            uuid=id,
            name=f"contract-{number}",
            image="micro",
            accel=Accel.TCG,
            vcpus=1,
            max_vcpus=4,
            memory=256 * MIB,
            max_memory=512 * MIB,
            kernel="/fake/kernel",
            initrd="/fake/initrd",
            cmdline="console=ttyS0",
            folder=folder,
            monitor=f"{folder}/qmp.sock",
            disks=(DiskSpec("data", "vda", f"{folder}/data.qcow2", 64 * MIB),),
            nics=(NicSpec("br0", "52:54:00:00:00:01", f"hvt{number}"),),
            pulse=f"{folder}/pulse",
        )

    def await_guest(self, vm: str) -> None:
        self.world.set_behaviour(vm, agent_gap=0)

    def await_vcpus(self, vm: str, count: int) -> None:
        assert self.world.vm(vm).online == [True] * count

    def spoil(self, vm: str) -> None:
        self.world.spoil(vm)

    def content(self, vm: str) -> Mapping[str, str]:
        return self.world.content(vm)

    def acknowledge(self, vm: str, notice: str) -> None:
        self.world.say(vm, f"ready {notice}")

    def kill(self, vm: Vm) -> None:
        self.world.destroy(vm.uuid)

    def alive(self, vm: Vm) -> bool:
        return any(v.process == vm.process for v in self.world.read().vms.values())

    def exists(self, path: str) -> bool:
        return any(p == path or p.startswith(f"{path}/") for p in self.world.read().files)

    def size(self, path: str) -> tuple[int, int]:
        return 0, len(self.world.read().files[path].part.text)

    def corrupt(self, path: str) -> None:
        self.world.corrupt(path)

    def remove_archive(self, folder: str) -> None:
        self.world.remove(folder)

    def snapshot(self, vm: Vm, name: str) -> Snapshot:
        return numbered_snapshot(self.host, vm, name, Path("/fake/snapshots"))
