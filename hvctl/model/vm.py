"""A VM as it is asked for (VmSpec) and as it is observed (Vm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hvctl.model.allocation import Allocation, Record


class Accel(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


class State(StrEnum):
    """libvirt's domain states, as far as they differ for what hvctl may do."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    CRASHED = "crashed"
    STOPPING = "stopping"
    SUSPENDED = "suspended"

    @property
    def active(self) -> bool:
        """Whether a QEMU process holds host resources."""
        return self not in (State.OFF,)


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk of a VM to create: a thin qcow2 overlay `path` over `backing`, or an empty one of `size` bytes."""

    name: str
    target: str
    path: str
    size: int
    backing: str | None = None
    backing_format: str | None = None


@dataclass(frozen=True, slots=True)
class NicSpec:
    bridge: str
    mac: str
    tap: str


@dataclass(frozen=True, slots=True)
class VmSpec:
    """A VM to create. `folder` is its state folder, `monitor` the path of the second QMP monitor's socket, `pulse` the
    common part of the paths of the two FIFOs (.in, .out) behind its sign-of-life port, None where it has no such port.
    """

    uuid: str
    name: str
    image: str
    accel: Accel
    vcpus: int
    max_vcpus: int
    memory: int
    max_memory: int
    kernel: str
    initrd: str
    cmdline: str
    folder: str
    monitor: str
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    record: Record | None = None
    pulse: str | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """One life of a QEMU process. start_time is field 22 of /proc/PID/stat, so a reused pid is told apart."""

    pid: int
    start_time: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Region:
    """One piece of guest RAM: the file that a memory backend of QEMU maps shared; name is the backend's id."""

    name: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Disk:
    """target is vda…, name the disk's serial where it has one, path the active image on the host, address where it is
    on the guest's PCI bus."""

    target: str
    name: str | None
    path: str | None
    format: str | None
    writable: bool
    node: str | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of one disk: what its image takes of the host's file system and what is left there, what it holds for its
    guest at most, and what it would take after a reset to the snapshot that was asked about (None: nobody knows)."""

    taken: int
    left: int
    size: int
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Nic:
    """tap is the host device of a running VM. foreign names what somebody else put on it, if anything."""

    mac: str
    model: str
    bridge: str | None
    tap: str | None
    foreign: str | None = None


@dataclass(frozen=True, slots=True)
class Balloon:
    """Balloon statistics in bytes; usable is the guest's MemAvailable. age is seconds since the guest reported."""

    actual: int
    total: int | None = None
    unused: int | None = None
    usable: int | None = None
    age: float | None = None

    @property
    def reported(self) -> bool:
        """Whether the guest's driver answers: without this, nothing may be taken from the guest."""
        return self.usable is not None and self.age is not None and self.age < 30


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM as observed. allocation is what is in force; record is what hvctl promised (None: never touched by hvctl).

    ram are the files of guest RAM of a running VM, empty where they cannot be seen. missing lists what the domain lacks
    for warm resets; empty means ready. has_agent tells of a channel for the guest agent, agent_connected whether the
    guest has it open, as libvirt last heard. monitor and pulse are paths as in VmSpec, None where there is none.
    """

    uuid: str
    name: str
    state: State
    reason: str
    accel: Accel
    persistent: bool
    process: Process | None
    allocation: Allocation
    max_vcpus: int
    max_memory: int
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    record: Record | None
    missing: tuple[str, ...] = ()
    monitor: str | None = None
    pulse: str | None = None
    ram: tuple[Region, ...] = ()
    has_balloon: bool = True
    has_agent: bool = True
    agent_connected: bool = True

    @property
    def protected(self) -> bool:
        return self.record is not None and self.record.protected

    @property
    def labels(self) -> dict[str, str]:
        return self.record.labels if self.record else {}
