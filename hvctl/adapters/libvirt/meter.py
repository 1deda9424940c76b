"""What running VMs use, from one bulk question to libvirt and the kernel's own files: ports.Meter of a real host.

libvirt is asked not to wait for a VM that another job holds: of such a VM it tells less, which is a gap in its samples
and not a cycle that comes late for all others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import libvirt

from hvctl.adapters.kernel import hostmemory
from hvctl.adapters.kernel.perfcounters import PerfCounters
from hvctl.adapters.kernel.vmlife import Lives
from hvctl.adapters.libvirt.calls import Connection, clean, with_deadline
from hvctl.adapters.network.guestconnections import Connections, tracked
from hvctl.errors import DeadlineError, RefusedError
from hvctl.model.meter import DiskCounters, NicCounters, Reading, VmReading

_WANTED = (
    libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_VCPU
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
_HOW = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
# How long a look that came late is left alone: libvirt's keepalive ends it earlier if its peer is dead.
_LATE_SECONDS = 60.0
# The guest's own figures are older than this when it does not report, or was stopped.
_FRESH_SECONDS = 60.0
_DIRTY_STATE, _DIRTY_MEASURED, _DIRTY_POLL = "dirtyrate.calc_status", 2, 0.1
_DIRTY_GRACE = 10.0

Stats = dict[str, Any]
T = TypeVar("T")


class LibvirtMeter:
    """Shares the connection of the host's domains."""

    def __init__(self, connection: Connection, deadline: float, boot_id: str) -> None:
        self._connection = connection
        self._deadline = deadline
        self._boot_id = boot_id
        self._looking = threading.Lock()
        self._lives = Lives()
        self._connections = Connections()
        self._perf = PerfCounters()

    def read(self) -> Reading:
        if not self._looking.acquire(blocking=False):
            raise DeadlineError(
                "libvirt has not ended the last look at the VMs yet.", "hvctl doctor tells whether libvirt answers"
            )
        # The lock goes with the thread that looks, not with who waits for it: one stuck look is not joined by others.
        return with_deadline("tell what the VMs use", self._deadline, self._look)

    def _look(self) -> Reading:
        try:
            wall, began = time.time(), time.monotonic()
            found = self._connection.call(
                "tell what the VMs use", lambda c: _stats(c.getAllDomainStats(_WANTED, _HOW)), _LATE_SECONDS
            )
            took = time.monotonic() - began
            vms = self._vms(found, wall)
        finally:
            self._looking.release()
        return Reading(wall + took / 2, began + took / 2, took, self._boot_id, vms)

    def _vms(self, found: list[tuple[str, str, int, Stats]], wall: float) -> tuple[VmReading, ...]:
        gone = self._lives.keep({uuid for _, uuid, _, _ in found})
        if gone:
            self._connections.forget()
            self._perf.keep({uuid for _, uuid, _, _ in found})
        nics = {uuid: _nics(stats) for _, uuid, _, stats in found}
        counts = self._connections.count({uuid: [n.tap for n in mine or ()] for uuid, mine in nics.items()})
        vms = []
        for name, uuid, number, stats in found:
            life = self._lives.of(name, uuid) if self._connection.local else None
            vcpus = range(stats.get("vcpu.maximum", 0))
            times = tuple((i, stats[f"vcpu.{i}.time"]) for i in vcpus if f"vcpu.{i}.time" in stats)
            delays = [stats[f"vcpu.{i}.delay"] for i in vcpus if f"vcpu.{i}.delay" in stats]
            fresh = abs(wall - stats.get("balloon.last-update", 0)) < _FRESH_SECONDS
            vms.append(
                VmReading(
                    uuid=uuid,
                    name=name,
                    life=life.name if life else f"domain {number}",
                    uptime=life.uptime if life else None,
                    vcpus=stats.get("vcpu.current"),
                    cpu=stats.get("cpu.time"),
                    vcpu_times=times,
                    steal=sum(delays) if delays else None,
                    memory=_bytes(stats, "balloon.current"),
                    unused=_bytes(stats, "balloon.unused") if fresh else None,
                    available=_bytes(stats, "balloon.available") if fresh else None,
                    usable=_bytes(stats, "balloon.usable") if fresh else None,
                    rss=_bytes(stats, "balloon.rss"),
                    disks=_disks(stats),
                    nics=nics[uuid],
                    stalls=life.stalls() if life else None,
                    hardware=self._perf.read(uuid, life.process) if life else None,
                    connections=counts.get(uuid),
                )
            )
        return tuple(sorted(vms, key=lambda vm: vm.name))

    def dirty_rate(self, uuid: str, seconds: int) -> int:
        def begin(connection: Any) -> None:
            domain = connection.lookupByUUIDString(uuid)
            if not domain.isActive():
                name = clean(domain.name(), 80)
                raise RefusedError(f"{name} does not run, and dirties no memory.", f"hvctl vm start {name}")
            # By samples of pages. The exact way, by dirty bitmap, ends an emulating QEMU 7.2 with a failed assertion.
            domain.startDirtyRateCalc(seconds, 0)

        self._connection.call(f"measure the dirtied pages of {uuid}", begin)
        until = time.monotonic() + seconds + _DIRTY_GRACE
        # Nobody says when it is measured, and until it has begun an earlier measurement stands there as the result.
        time.sleep(seconds)
        while time.monotonic() < until:
            time.sleep(_DIRTY_POLL)
            stats = self._connection.call("read the dirtied pages", lambda c: _dirty(c, uuid))
            if stats.get(_DIRTY_STATE) == _DIRTY_MEASURED:
                return int(stats["dirtyrate.megabytes_per_second"]) << 20
        raise DeadlineError(f"QEMU did not measure the dirtied pages of {uuid} within {seconds + _DIRTY_GRACE:g} s.")

    def available(self) -> int:
        return hostmemory.available()

    def lacks(self) -> tuple[str, ...]:
        said = []
        if self._perf.fault is not None:
            said.append(f"hardware counters ({self._perf.fault})")
        if not self._lives.has_pressure:
            said.append("PSI of VMs (there is no unified cgroup hierarchy with it)")
        if not tracked():
            said.append("connections of VMs (this kernel tracks none)")
        return tuple(said)

    def close(self) -> None:
        self._perf.close()


def _stats(found: list[tuple[Any, Stats]]) -> list[tuple[str, str, int, Stats]]:
    """Name, UUID and number of each domain, in the thread that has the connection."""
    return [(domain.name(), domain.UUIDString(), domain.ID(), stats) for domain, stats in found]


def _dirty(connection: Any, uuid: str) -> Stats:
    domain = connection.lookupByUUIDString(uuid)
    found = connection.domainListGetStats([domain], libvirt.VIR_DOMAIN_STATS_DIRTYRATE)
    return dict(found[0][1]) if found else {}


def _bytes(stats: Stats, name: str) -> int | None:
    kib = stats.get(name)
    return None if kib is None else int(kib) * 1024


def _disks(stats: Stats) -> tuple[DiskCounters, ...] | None:
    """None if libvirt tells of no disk what it did, which is so when another job has the monitor."""
    return _each(stats, "block", DiskCounters, ("name", "rd.reqs", "wr.reqs", "rd.bytes", "wr.bytes"))


def _nics(stats: Stats) -> tuple[NicCounters, ...] | None:
    return _each(stats, "net", NicCounters, ("name", "rx.bytes", "tx.bytes", "rx.pkts", "tx.pkts"))


def _each(stats: Stats, group: str, made: Callable[..., T], fields: Sequence[str]) -> tuple[T, ...] | None:
    """One of each device of a group, from these fields of it in their order; None if one of them lacks any."""
    try:
        return tuple(
            made(*(stats[f"{group}.{i}.{field}"] for field in fields)) for i in range(stats.get(f"{group}.count", 0))
        )
    except KeyError:
        return None
