"""Collector: one look at the VMs after the other, what they used between two of them, and into the database with it.

What the database does not take now is kept, within a bound, and goes with the next cycle: a locked database costs no
samples, and a long outage costs the oldest ones.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.decide.rates import happened, used
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, UnreachableError
from hvctl.model.meter import Reading
from hvctl.model.operation import Kind, Operation, OpState
from hvctl.model.sample import EventKind, Sample, VmEvent
from hvctl.units import moment

LONGEST_CYCLES = 2.5
"""Cycles that may lie between two readings: one may be missing, more are a gap."""

MOST_KEPT = 100_000
"""Samples that are kept for a database that does not take them: a quarter of an hour of 1,000 VMs, some 50 MB."""

_FILE = "reading.json"
_OVERLAP = 60.0
_REASONS = 20
_JOURNAL = {
    Kind.RESET: EventKind.RESET,
    Kind.SNAPSHOT_LOAD: EventKind.LOAD,
    Kind.INTERRUPT: EventKind.INTERRUPTION,
    Kind.RESUME: EventKind.RESTART,
}


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle: VMs seen, samples and events written, kept for later and lost; gap says why there are none."""

    vms: int
    samples: int
    events: int
    gap: str | None = None
    kept: int = 0
    lost: int = 0
    fault: str | None = None

    def __str__(self) -> str:
        text = f"{self.vms} VMs, {self.samples} samples"
        text += f", {self.events} events" if self.events else ""
        text += f", no samples: {self.gap}" if self.gap else ""
        text += f", {self.kept} kept for the next cycle: {self.fault}" if self.fault else ""
        return text + (f", {self.lost} of the oldest lost" if self.lost else "")


class Collector:
    """longest is how many seconds may lie between two readings of one sample (None: as the interval says)."""

    def __init__(self, engine: Engine, longest: float | None = None) -> None:
        self._engine = engine
        self._host = engine.facts.name
        self._longest = longest or LONGEST_CYCLES * engine.settings.collect_interval
        self._before: Reading | None = None
        self._samples: deque[Sample] = deque()
        self._events: list[VmEvent] = []
        self._journal_from = time.time()

    def cycle(self) -> Cycle:
        """Look, compare with the look before, write. Errors of the meter leave, and the next cycle looks anew; those of
        the database are in what it answers."""
        reading = self._engine.host.meter.read()
        found = used(self._before, reading, self._longest)
        events = happened(self._before, reading)
        self._before = reading
        self._samples.extend(found.samples)
        self._events += [self._with_reason(e) for e in events] if len(events) <= _REASONS else events
        lost = max(0, len(self._samples) - MOST_KEPT)
        for _ in range(lost):
            self._samples.popleft()
        del self._events[:-MOST_KEPT]
        fault, written = None, (0, 0)
        try:
            written = self.flush(reading.at)
        except (BusyError, UnreachableError) as e:
            fault = e.message
        return Cycle(len(reading.vms), *written, found.gap, len(self._samples), lost, fault)

    def flush(self, now: float | None = None) -> tuple[int, int]:
        """Write what is kept, with what the journal says since the last time; how many samples and events."""
        now = time.time() if now is None else now
        events = [*self._events, *self._journal(now)]
        counts = len(self._samples), len(self._events)
        self._engine.store.samples.add(self._host, self._samples, events, now)
        self._samples.clear()
        self._events.clear()
        self._journal_from = now
        return counts

    def _journal(self, now: float) -> list[VmEvent]:
        """What ended lately and the journal alone tells. The same may be found twice, and is stored once."""
        since = datetime.fromtimestamp(min(self._journal_from, now) - _OVERLAP, UTC)
        closed = self._engine.store.closed_since(self._host, since.isoformat(timespec="microseconds")[:-6] + "Z")
        return [_event(o) for o in closed if o.kind in _JOURNAL and o.state is OpState.DONE]

    def _with_reason(self, event: VmEvent) -> VmEvent:
        """Why a VM stopped, as libvirt says: a call for each, so that of many at once it is not asked."""
        if event.kind is not EventKind.STOP or event.detail:
            return event
        try:
            vm = self._engine.host.domains.get(event.vm_uuid)
        except HvctlError:
            return event
        return event if vm.state.active else replace(event, detail=vm.reason)

    # --- from one process to the next

    def remember(self, folder: Path) -> None:
        """Leave the last reading for the next process, whose first cycle then has one to compare with."""
        if self._before is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(folder / _FILE, codec.dump_json(self._before).decode())

    def recall(self, folder: Path) -> None:
        """Take up the reading that another process left; what cannot be read is no reading."""
        try:
            self._before = codec.load_json(Reading, (folder / _FILE).read_bytes())
        except (OSError, HvctlError):
            return


def _event(operation: Operation) -> VmEvent:
    assert operation.closed_at is not None
    at = moment(operation.closed_at)
    detail = str(operation.request.get("to", operation.request.get("rung", "")))
    return VmEvent(operation.vm_uuid, operation.vm_name, _JOURNAL[operation.kind], at, detail, operation.id)
