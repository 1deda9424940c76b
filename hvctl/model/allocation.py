"""What a VM may use: the allocation, and a change that names only some of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from hvctl.model.guard import Watch


class Keep(Enum):
    """Stands for "this part of the allocation is not asked to change", where None means "no limit"."""

    KEEP = "keep"


KEEP = Keep.KEEP


@dataclass(frozen=True, slots=True)
class NicLimit:
    """Bandwidth of one NIC in bits per second, seen from the guest; None is unlimited."""

    mac: str
    inbound: int | None = None
    outbound: int | None = None


@dataclass(frozen=True, slots=True)
class DiskLimit:
    """Block I/O of one disk: operations and bytes per second; None is unlimited.

    A burst is what may be used for `burst_seconds` before the steady figure holds again.
    """

    target: str
    iops: int | None = None
    rate: int | None = None
    iops_burst: int | None = None
    rate_burst: int | None = None
    burst_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a VM may use now.

    cpu_quota is in percent of one CPU (150 = one and a half) for the whole VM, cpu_weight is cgroup v2's
    1 to 10000 with 100 as the default, memory is the balloon's target in bytes.
    """

    vcpus: int
    memory: int
    cpu_quota: int | None = None
    cpu_weight: int | None = None
    nics: tuple[NicLimit, ...] = ()
    disks: tuple[DiskLimit, ...] = ()

    def nic(self, mac: str) -> NicLimit:
        return next((n for n in self.nics if n.mac == mac), NicLimit(mac))

    def disk(self, target: str) -> DiskLimit:
        return next((d for d in self.disks if d.target == target), DiskLimit(target))


@dataclass(frozen=True, slots=True)
class NicChange:
    """A change of one NIC; nic is a MAC address or a tap device, None means every NIC of the VM."""

    nic: str | None = None
    inbound: int | Keep | None = KEEP
    outbound: int | Keep | None = KEEP


@dataclass(frozen=True, slots=True)
class DiskChange:
    """A change of one disk; disk is a target (vda) or a serial (data), None means every writable disk."""

    disk: str | None = None
    iops: int | Keep | None = KEEP
    rate: int | Keep | None = KEEP
    iops_burst: int | Keep | None = KEEP
    rate_burst: int | Keep | None = KEEP
    burst_seconds: int | Keep | None = KEEP


@dataclass(frozen=True, slots=True)
class Change:
    """What an operator asks to change of an allocation; what is KEEP stays."""

    vcpus: int | Keep = KEEP
    memory: int | Keep = KEEP
    cpu_quota: int | Keep | None = KEEP
    cpu_weight: int | Keep | None = KEEP
    nics: tuple[NicChange, ...] = ()
    disks: tuple[DiskChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Resources:
    """A vector of what is counted against a host's capacity.

    cpu in percent of one CPU, memory in bytes, network in bits per second (the larger direction), iops per second.
    An unlimited bandwidth or IOPS counts as 0: it is best effort and holds nothing.
    """

    cpu: int = 0
    memory: int = 0
    network: int = 0
    iops: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu + other.cpu, self.memory + other.memory, self.network + other.network, self.iops + other.iops
        )

    def __sub__(self, other: Resources) -> Resources:
        """Elementwise, never below 0."""
        return Resources(
            max(0, self.cpu - other.cpu),
            max(0, self.memory - other.memory),
            max(0, self.network - other.network),
            max(0, self.iops - other.iops),
        )

    def least(self, other: Resources) -> Resources:
        """Elementwise minimum."""
        return Resources(
            min(self.cpu, other.cpu),
            min(self.memory, other.memory),
            min(self.network, other.network),
            min(self.iops, other.iops),
        )

    @property
    def any(self) -> bool:
        return bool(self.cpu or self.memory or self.network or self.iops)

    def largest(self, other: Resources) -> Resources:
        """Elementwise maximum: what a resize holds until it is closed."""
        return Resources(
            max(self.cpu, other.cpu),
            max(self.memory, other.memory),
            max(self.network, other.network),
            max(self.iops, other.iops),
        )


def resources(allocation: Allocation) -> Resources:
    """What an allocation holds of its host."""
    cpu = allocation.vcpus * 100
    if allocation.cpu_quota is not None:
        cpu = min(cpu, allocation.cpu_quota)
    return Resources(
        cpu=cpu,
        memory=allocation.memory,
        network=sum(max(n.inbound or 0, n.outbound or 0) for n in allocation.nics),
        iops=sum(d.iops or 0 for d in allocation.disks),
    )


@dataclass(frozen=True, slots=True)
class Record:
    """What hvctl promised a VM, kept in the domain's metadata and in the database. priority is from 0 to 1000;
    interruptible: its resources may be taken back while it runs, and it then comes back later. guard: who looks after
    it, by which policy."""

    allocation: Allocation
    image: str | None = None
    protected: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    priority: int = 500
    interruptible: bool = False
    guard: Watch | None = None

    def with_allocation(self, allocation: Allocation) -> Record:
        return replace(self, allocation=allocation)

    def with_memory(self, memory: int) -> Record:
        return self.with_allocation(replace(self.allocation, memory=memory))
