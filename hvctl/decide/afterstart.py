"""What VMs needed right after their starts: from their samples and what happened to them to restarts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from hvctl.model.restart import Restart
from hvctl.model.sample import EventKind, Sample, VmEvent

SPANS: Final = (300, 1800, 3600)
"""The seconds after a start that are looked at."""
HOUR: Final = 3600.0
COVERED: Final = 0.5
"""The share of a span that samples must cover; of less nothing is said."""

_ENDS: Final = (EventKind.STOP, EventKind.INTERRUPTION)
_MIB: Final = 1 << 20


def _sum(*parts: float | None) -> float | None:
    return None if None in parts else sum(p for p in parts if p is not None)


MEASURES: Final[Mapping[str, Callable[[Sample], float | None]]] = {
    "cpu": lambda s: s.cpu,
    "memory": lambda s: None if s.memory_used is None else s.memory_used / _MIB,
    "disk": lambda s: _scaled(_sum(s.disk_read_bytes, s.disk_write_bytes), 1e-3),
    "network": lambda s: _scaled(_sum(s.net_rx_bytes, s.net_tx_bytes), 8e-6),
    "iops": lambda s: _sum(s.disk_reads, s.disk_writes),
}
"""Of one sample: cores, MiB, KB/s, Mbit/s, 1/s."""


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def restarts(
    events: Iterable[VmEvent],
    samples: Sequence[Sample],
    images: Mapping[str, str],
    now: float,
    spans: Sequence[int] = SPANS,
    lead: float = HOUR,
) -> list[Restart]:
    """Every start with every span that is over. events and samples are of one host in the order of time; images are by
    the VM's UUID; lead are the seconds before a stop that `before` is of. A span in which the VM stopped again is left
    out: what it would have needed nobody saw."""
    ended: dict[str, float] = {}
    starts: list[tuple[str, float, float | None]] = []
    stops: dict[str, list[float]] = {}
    for event in events:
        if event.kind in _ENDS:
            ended[event.vm_uuid] = event.at
            stops.setdefault(event.vm_uuid, []).append(event.at)
        elif event.kind is EventKind.START:
            starts.append((event.vm_uuid, event.at, ended.get(event.vm_uuid)))
    of_vm: dict[str, list[Sample]] = {}
    for sample in samples:
        of_vm.setdefault(sample.uuid, []).append(sample)
    found = []
    for uuid, at, off in starts:
        own = of_vm.get(uuid, [])
        times = [s.at for s in own]
        hour = () if off is None else own[bisect_right(times, off - lead) : bisect_right(times, off)]
        for span in spans:
            over = at + span <= now and not any(at < stop < at + span for stop in stops.get(uuid, ()))
            after = own[bisect_right(times, at) : bisect_right(times, at + span)] if over else ()
            if after and sum(s.seconds for s in after) >= COVERED * span:
                gap = None if off is None else at - off
                found.append(
                    Restart(
                        uuid, images.get(uuid), at, gap, span, _each(after, max), _each(after, None), _each(hour, max)
                    )
                )
    return found


def _each(samples: Sequence[Sample], of: Callable[[Iterable[float]], float] | None) -> dict[str, float]:
    """By resource what `of` makes of the measured samples; None: their mean, each by its seconds."""
    result = {}
    for resource, measure in MEASURES.items():
        known = [(value, s.seconds) for s in samples if (value := measure(s)) is not None]
        if known and of is not None:
            result[resource] = of(value for value, _ in known)
        elif known:
            result[resource] = sum(v * s for v, s in known) / sum(s for _, s in known)
    return result
