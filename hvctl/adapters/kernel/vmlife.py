"""Which life of a QEMU process a reading is of, and what the kernel knows of that life: its age, and how long its
control group stalled. Looked up once for each life; a look at a known one costs one file of /proc."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.kernel import process
from hvctl.model.meter import Stalls
from hvctl.model.vm import Process

_TICKS = os.sysconf("SC_CLK_TCK")
_PRESSURES = ("cpu.pressure", "memory.pressure", "io.pressure")
# libvirt's groups below that of a VM, with cgroup v1 and with v2.
_INNER = ("/libvirt/emulator", "/emulator", "/libvirt")


@dataclass(frozen=True, slots=True)
class Life:
    """One QEMU process; group is the VM's folder in the unified hierarchy, None where it has none of its own."""

    process: Process
    group: Path | None

    @property
    def name(self) -> str:
        return f"{self.process.pid}:{self.process.start_time}:{self.process.boot_id}"

    @property
    def uptime(self) -> float:
        """Seconds since the process started."""
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.process.start_time / _TICKS)

    def stalls(self) -> Stalls | None:
        if self.group is None:
            return None
        try:
            cpu, memory, io = (_total((self.group / name).read_bytes()) for name in _PRESSURES)
        except (OSError, ValueError):
            return None
        return Stalls(cpu, memory, io)


class Lives:
    """The QEMU processes of one host's VMs by UUID."""

    def __init__(self, cgroup: Path = Path("/sys/fs/cgroup")) -> None:
        self._known: dict[str, Life] = {}
        # Where v1 holds the controllers, the unified hierarchy is mounted beside it, and has PSI all the same.
        self._root = next((p for p in (cgroup, cgroup / "unified") if (p / "cgroup.controllers").exists()), None)

    @property
    def has_pressure(self) -> bool:
        return self._root is not None and (self._root / _PRESSURES[0]).exists()

    def of(self, name: str, uuid: str) -> Life | None:
        """Of a running domain; None if its process cannot be seen."""
        known = self._known.get(uuid)
        if known is not None and process.start_time(known.process.pid) == known.process.start_time:
            return known
        self._known.pop(uuid, None)
        found = process.find(name, uuid)
        if found is None:
            return None
        self._known[uuid] = Life(found, self._group(found.pid))
        return self._known[uuid]

    def keep(self, uuids: set[str]) -> list[Life]:
        """Forget all other VMs; those that were forgotten."""
        gone = self._known.keys() - uuids
        return [self._known.pop(uuid) for uuid in gone]

    def _group(self, pid: int) -> Path | None:
        if self._root is None:
            return None
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            return None
        path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
        for inner in _INNER:
            path = path.removesuffix(inner)
        # A group that others are in too would tell of their stalls as if they were the VM's.
        if not path.startswith("/machine"):
            return None
        group = self._root / path.lstrip("/")
        return group if all((group / name).exists() for name in _PRESSURES) else None


def _total(text: bytes) -> int:
    """`some avg10=0.00 avg60=0.00 avg300=0.00 total=1234`, and a line for `full` on which nothing could run."""
    line = text.partition(b"\n")[0]
    return int(line.rpartition(b"total=")[2])
