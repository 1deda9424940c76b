"""What a VM used between two readings (Sample), what happened to it (VmEvent), and which of it is rolled up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Sample(NamedTuple):
    """Use of one VM over the `seconds` that ended at `at` (wall clock, seconds since 1970); None where it is not known.

    cpu, cpu_busiest (its busiest vCPU) and steal are cores; memory is what the balloon leaves the guest, used is
    available - usable, all in bytes; disk and network are per second; stalls are shares of the time from 0 to 1;
    cycles, instructions and cache_misses are per second. uptime is seconds since its QEMU process started. The last
    field, use of each vCPU by number, is not stored."""

    uuid: str
    name: str
    at: int
    seconds: float
    uptime: float | None = None
    vcpus: float | None = None
    cpu: float | None = None
    cpu_busiest: float | None = None
    steal: float | None = None
    memory: float | None = None
    memory_used: float | None = None
    memory_unused: float | None = None
    memory_available: float | None = None
    memory_usable: float | None = None
    rss: float | None = None
    disk_reads: float | None = None
    disk_writes: float | None = None
    disk_read_bytes: float | None = None
    disk_write_bytes: float | None = None
    net_rx_bytes: float | None = None
    net_tx_bytes: float | None = None
    net_rx_packets: float | None = None
    net_tx_packets: float | None = None
    connections: float | None = None
    stall_cpu: float | None = None
    stall_memory: float | None = None
    stall_io: float | None = None
    cycles: float | None = None
    instructions: float | None = None
    cache_misses: float | None = None
    per_vcpu: tuple[tuple[int, float], ...] = ()


STORED = Sample._fields[3:-1]
"""The columns of a raw sample, in their order, beside whose and when it is."""

ROLLED = (
    "cpu",
    "steal",
    "memory_used",
    "rss",
    "disk_reads",
    "disk_writes",
    "disk_read_bytes",
    "disk_write_bytes",
    "net_rx_bytes",
    "net_tx_bytes",
    "net_rx_packets",
    "net_tx_packets",
    "connections",
    "stall_cpu",
    "stall_memory",
    "stall_io",
    "cycles",
    "instructions",
    "cache_misses",
)
"""What the roll-up keeps, each as mean, max and 95th percentile."""

DEMANDS: Final[Mapping[str, tuple[tuple[str, ...], float]]] = {
    "cpu": (("cpu",), 1.0),
    "memory": (("memory_used",), 1 / (1 << 20)),
    "disk": (("disk_read_bytes", "disk_write_bytes"), 1e-3),
    "network": (("net_rx_bytes", "net_tx_bytes"), 8e-6),
    "iops": (("disk_reads", "disk_writes"), 1.0),
}
"""The resources of forecasts: the measures whose sum each is, and the factor to its unit."""

UNITS: Final[Mapping[str, str]] = {"cpu": "cores", "memory": "MiB", "disk": "KB/s", "network": "Mbit/s", "iops": "1/s"}

STATISTICS = ("mean", "max", "p95")
KEPT = ("count", "seconds", "vcpus", "memory")
"""What the roll-up keeps once: how many samples, the seconds that they cover, and what the VM had at last."""

ROLLED_COLUMNS = KEPT + tuple(f"{measure}_{statistic}" for measure in ROLLED for statistic in STATISTICS)


class EventKind(StrEnum):
    """interruption: the platform took an interruptible VM's resources; restart: it gave them back."""

    START = "start"
    STOP = "stop"
    RESET = "reset"
    LOAD = "load"
    INTERRUPTION = "interruption"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class VmEvent:
    """at is the wall clock in seconds since 1970, as exactly as it is known; operation is the journal's number."""

    vm_uuid: str
    vm_name: str
    kind: EventKind
    at: float
    detail: str = ""
    operation: int | None = None
