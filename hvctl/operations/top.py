"""What VMs use now beside what they may use, are expected to use, and were promised: from the daemon's samples where a
daemon collects, else from two readings of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hvctl.decide.rates import used
from hvctl.engine.expected import newest
from hvctl.engine.operate import Engine
from hvctl.model.allocation import Resources
from hvctl.model.meter import Reading
from hvctl.model.sample import Sample

TREND = 20
"""Samples of a sparkline."""

FRESH_CYCLES = 3.0
"""Cycles of collection after which samples are not those of now."""


class Resource(StrEnum):
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Use:
    """cpu in cores, memory in bytes, disk in bytes per second, network in bits per second; None is not known."""

    cpu: float | None = None
    memory: float | None = None
    disk: float | None = None
    network: float | None = None
    iops: float | None = None


NOTHING = Use()
Forecasts = Callable[[Engine, Sequence[str]], Mapping[str, Use]]


def kept_forecasts(engine: Engine, uuids: Sequence[str]) -> Mapping[str, Use]:
    """The peaks of the next hour as the node forecast them last; nothing of a VM that it did not."""
    found = {}
    known = newest(engine)
    for uuid in uuids:
        if of_vm := known.get(uuid):
            peaks = {resource: one.peak * _FACTORS[resource] for resource, one in of_vm.items() if resource in _FACTORS}
            found[uuid] = Use(**peaks)
    return found


# From the units of forecasts to those of Use.
_FACTORS = {"cpu": 1.0, "memory": float(1 << 20), "disk": 1000.0, "network": 1e6}


@dataclass(frozen=True, slots=True)
class Line:
    """One VM. allocated and promised name what is limited; trend are recent values of the resource that is sorted by,
    the oldest first."""

    uuid: str
    name: str
    at: int
    used: Use
    allocated: Use
    forecast: Use = NOTHING
    promised: Use = NOTHING
    per_vcpu: tuple[tuple[int, float], ...] = ()
    trend: list[float | None] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return asdict(self)


class Top:
    """Looks again and again; sort is the resource that the busiest VM comes first by. gap: why the last look tells of
    nobody, None if it does tell."""

    def __init__(self, engine: Engine, sort: Resource, forecasts: Forecasts = kept_forecasts) -> None:
        self._engine = engine
        self._sort = sort
        self._forecasts = forecasts
        self._before: Reading | None = None
        self.gap: str | None = None
        self._trends: dict[str, deque[Sample]] = {}

    def look(self, interval: float) -> list[Line]:
        """The VMs now; without a daemon's samples the first look takes `interval` seconds."""
        trends = self._stored() or self._read(interval)
        host = self._engine.facts.name
        promised = {p.vm_uuid: _promise(p.resources) for p in self._engine.store.promises(host)}
        expected = self._forecasts(self._engine, list(trends))
        lines = [
            self._line(uuid, samples, expected.get(uuid, NOTHING), promised.get(uuid, NOTHING))
            for uuid, samples in trends.items()
        ]
        return sorted(lines, key=lambda line: (-(self._value(line.used) or 0.0), line.name))

    def _line(self, uuid: str, samples: Sequence[Sample], expected: Use, promised: Use) -> Line:
        now = samples[-1]
        trend = [self._value(_use(s)) for s in samples]
        allocated = Use(cpu=now.vcpus, memory=now.memory)
        return Line(uuid, now.name, now.at, _use(now), allocated, expected, promised, now.per_vcpu, trend)

    def _value(self, use: Use) -> float | None:
        found: float | None = getattr(use, self._sort.value)
        return found

    def _stored(self) -> dict[str, Sequence[Sample]]:
        """By VM, of those that the newest cycle saw; nothing if that is long ago."""
        interval = self._engine.settings.collect_interval
        now = time.time()
        found = self._engine.store.samples.latest(self._engine.facts.name, int(now - (TREND + FRESH_CYCLES) * interval))
        if not found or found[-1].at < now - FRESH_CYCLES * interval:
            return {}
        newest = found[-1].at
        trends: dict[str, list[Sample]] = {}
        for sample in found:
            trends.setdefault(sample.uuid, []).append(sample)
        return {u: mine[-TREND:] for u, mine in trends.items() if mine[-1].at == newest}

    def _read(self, interval: float) -> dict[str, Sequence[Sample]]:
        meter = self._engine.host.meter
        if self._before is None:
            self._before = meter.read()
            time.sleep(interval)
        now = meter.read()
        found = used(self._before, now, float("inf"))
        self._before, self.gap = now, found.gap
        for sample in found.samples:
            self._trends.setdefault(sample.uuid, deque(maxlen=TREND)).append(sample)
        return {s.uuid: list(self._trends[s.uuid]) for s in found.samples}


def _use(sample: Sample) -> Use:
    net = _sum(sample.net_rx_bytes, sample.net_tx_bytes)
    return Use(
        cpu=sample.cpu,
        memory=sample.memory_used if sample.memory_used is not None else sample.rss,
        disk=_sum(sample.disk_read_bytes, sample.disk_write_bytes),
        network=None if net is None else net * 8,
        iops=_sum(sample.disk_reads, sample.disk_writes),
    )


def _promise(resources: Resources) -> Use:
    """Bandwidth and IOPS that are not limited are promised to nobody."""
    return Use(
        cpu=resources.cpu / 100,
        memory=resources.memory,
        network=resources.network or None,
        iops=resources.iops or None,
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
