"""What running VMs use of their host now, as its kernel counts it: CPU time of their processes and bytes on their taps,
read twice a moment apart."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvctl.adapters.kernel.process import boot_id, start_time
from hvctl.model.vm import Vm

_MOMENT = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Use:
    """cpu in percent of one CPU, network in bits per second (the larger direction); None: it cannot be seen."""

    cpu: int | None
    network: int | None


@dataclass(frozen=True, slots=True)
class _Counters:
    at: float
    cpu: int | None
    taps: tuple[int, int] | None


def uses(vms: Sequence[Vm]) -> dict[str, Use]:
    """By uuid, of those that run here."""
    running = [vm for vm in vms if vm.state.active and vm.process is not None]
    first = {vm.uuid: _counters(vm) for vm in running}
    if any(c.cpu is not None or c.taps is not None for c in first.values()):
        time.sleep(_MOMENT)
    return {vm.uuid: _use(first[vm.uuid], _counters(vm)) for vm in running}


def _use(one: _Counters, two: _Counters) -> Use:
    seconds = max(two.at - one.at, 1e-3)
    cpu = None if one.cpu is None or two.cpu is None else round((two.cpu - one.cpu) * 100 / _TICKS / seconds)
    network = None
    if one.taps is not None and two.taps is not None:
        network = round(max(b - a for a, b in zip(one.taps, two.taps, strict=True)) * 8 / seconds)
    return Use(cpu, network)


def _counters(vm: Vm) -> _Counters:
    return _Counters(time.monotonic(), _cpu_ticks(vm), _tap_bytes(vm))


def _cpu_ticks(vm: Vm) -> int | None:
    """utime and stime of the process, fields 14 and 15 of its stat (proc(5)), if it is still the one that was seen."""
    process = vm.process
    if process is None or process.boot_id != boot_id() or start_time(process.pid) != process.start_time:
        return None
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])


def _tap_bytes(vm: Vm) -> tuple[int, int] | None:
    total = [0, 0]
    taps = [n.tap for n in vm.nics if n.tap]
    for tap in taps:
        for i, name in enumerate(("rx_bytes", "tx_bytes")):
            try:
                total[i] += int(Path(f"/sys/class/net/{tap}/statistics/{name}").read_text())
            except (OSError, ValueError):
                return None
    return (total[0], total[1]) if taps else None
