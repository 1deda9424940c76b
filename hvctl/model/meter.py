"""What one look at a host's running VMs finds: counters that grow while a QEMU process lives, and amounts as they are.

Named tuples and no dataclasses: ten thousand of them are made in a cycle. None is "this host or guest does not tell",
which is never the same as zero.
"""

from __future__ import annotations

from typing import NamedTuple


class DiskCounters(NamedTuple):
    target: str
    reads: int
    writes: int
    read_bytes: int
    write_bytes: int


class NicCounters(NamedTuple):
    """Seen from the guest: rx is what it received."""

    tap: str
    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int


class Stalls(NamedTuple):
    """PSI of the VM's own control group: microseconds in which some of its threads waited."""

    cpu: int
    memory: int
    io: int


class Hardware(NamedTuple):
    """Counters of the processor while it ran the VM's vCPUs."""

    cycles: int
    instructions: int
    cache_misses: int


class VmReading(NamedTuple):
    """One running VM. life tells one QEMU process from another; uptime is seconds since it started.

    cpu is nanoseconds of the whole VM, vcpu_times those of each vCPU by number, steal what vCPUs waited for a CPU of
    the host; memory (what the balloon leaves the guest) and the guest's own figures are bytes, None where the guest has
    not reported them lately. connections are tracked ones of the VM's addresses."""

    uuid: str
    name: str
    life: str
    uptime: float | None = None
    vcpus: int | None = None
    cpu: int | None = None
    vcpu_times: tuple[tuple[int, int], ...] = ()
    steal: int | None = None
    memory: int | None = None
    unused: int | None = None
    available: int | None = None
    usable: int | None = None
    rss: int | None = None
    disks: tuple[DiskCounters, ...] | None = None
    nics: tuple[NicCounters, ...] | None = None
    stalls: Stalls | None = None
    hardware: Hardware | None = None
    connections: int | None = None


class Reading(NamedTuple):
    """All running VMs of a host at one moment. at is the wall clock (seconds since 1970), clock one that never jumps
    (seconds, of this boot); both are of the middle of the look, which took `took` seconds."""

    at: float
    clock: float
    took: float
    boot_id: str
    vms: tuple[VmReading, ...]
