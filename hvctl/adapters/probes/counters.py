"""Counters of the processor, which tell what vCPUs do with their time: opened once, on a thread of hvctl's own."""

from __future__ import annotations

from hvctl.adapters.kernel.perfcounters import PerfCounters
from hvctl.model.finding import Finding, degraded, ok


def probe() -> Finding:
    counters = PerfCounters()
    counters.close()
    if counters.fault is None:
        return ok("hardware-counters", "cycles, instructions and cache misses of a thread can be counted")
    return degraded(
        "hardware-counters",
        counters.fault,
        "cycles, instructions and cache misses of VMs: they are absent from samples",
        "nothing on a machine without them (many clouds); else run hvctl as root, with perf_event_paranoid below 3",
    )
