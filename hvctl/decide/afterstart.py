"""What VMs needed right after their starts: from their samples and what happened to them to restarts, and beside what
was predicted for those that came back from an interruption."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from hvctl.model.pool import Away
from hvctl.model.restart import ForecastError, Restart
from hvctl.model.sample import DEMANDS, EventKind, Sample, VmEvent

SPANS: Final = (300, 1800, 3600)
"""The seconds after a start that are looked at."""
HOUR: Final = 3600.0
COVERED: Final = 0.5
"""The share of a span that samples must cover; of less nothing is said."""

_SLACK: Final = 1.0  # seconds: a start is known to the second

_ENDS: Final = (EventKind.STOP, EventKind.INTERRUPTION)


def demand(sample: Sample, resource: str) -> float | None:
    """Of one sample, in the unit of DEMANDS; None if part of it was not measured."""
    measures, factor = DEMANDS[resource]
    parts = [getattr(sample, name) for name in measures]
    return None if None in parts else sum(parts) * factor


def peaks(samples: Sequence[Sample]) -> dict[str, float]:
    """The largest sample by resource; what was never measured is absent."""
    known = {r: [v for s in samples if (v := demand(s, r)) is not None] for r in DEMANDS}
    return {resource: max(values) for resource, values in known.items() if values}


def means(samples: Sequence[Sample]) -> dict[str, float]:
    """By resource, each sample by its seconds; what was never measured is absent."""
    found = {}
    for resource in DEMANDS:
        known = [(value, s.seconds) for s in samples if (value := demand(s, resource)) is not None]
        if known:
            found[resource] = sum(v * s for v, s in known) / sum(s for _, s in known)
    return found


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
                found.append(Restart(uuid, images.get(uuid), at, gap, span, peaks(after), means(after), peaks(hour)))
    return found


def forecast_errors(away: Away, record: Iterable[Restart]) -> list[ForecastError]:
    """How far the forecast of a return was off, by span and resource, as far as that is known. Only a VM whose process
    ended starts again: of one that was paused or squeezed nothing is said."""
    if away.returned_at is None or not away.rung.ends_process:
        return []
    last = away.returned_at + _SLACK
    mine = [r for r in record if r.vm_uuid == away.vm_uuid and away.out_at - _SLACK <= r.at <= last]
    first = min((r.at for r in mine), default=None)
    return [
        ForecastError(resource, r.span, predicted, r.peak[resource])
        for r in sorted(mine, key=lambda r: r.span)
        if r.at == first
        for resource, predicted in away.predicted.items()
        if resource in r.peak
    ]
