"""What a cycle of guards sees of the host, read once for all VMs that are guarded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvctl.decide.admission import holders
from hvctl.decide.reservations import Holders
from hvctl.engine.expected import newest
from hvctl.engine.handover import capacity
from hvctl.engine.observe import observe_all
from hvctl.model.guard import Watch
from hvctl.model.host import Capacity
from hvctl.model.meter import VmReading
from hvctl.model.pool import Reservation
from hvctl.model.prediction import Prediction
from hvctl.model.sample import Sample
from hvctl.model.vm import Vm

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine


@dataclass(frozen=True, slots=True)
class HostLook:
    """What one cycle sees of the host, for all VMs at once, until something is done about one of them. available: bytes
    of memory that are free, without the reserve; readings: what each VM has now, by uuid; samples: of each VM, as far
    back as its policy looks; held: what is promised to whom."""

    vms: tuple[Vm, ...]
    interrupted: frozenset[str]
    available: int
    readings: Mapping[str, VmReading]
    forecasts: Mapping[str, Mapping[str, Prediction]]
    samples: Mapping[str, Sequence[Sample]]
    capacity: Capacity
    held: Holders
    reservations: Sequence[Reservation]


def look_at_host(engine: Engine, guarded: Iterable[tuple[Vm, Watch]]) -> HostLook:
    available = engine.host.meter.available() - engine.settings.reserve_memory
    readings = {r.uuid: r for r in engine.host.meter.read().vms}
    away = frozenset(a.vm_uuid for a in engine.store.pool.away(engine.facts.name))
    observed, ledger = observe_all(engine.host), engine.store.ledger(engine.facts.name)
    return HostLook(
        observed, away, max(0, available), readings, newest(engine), _samples(engine, guarded), capacity(engine),
        holders(ledger, observed), ledger.reservations,
    )  # fmt: skip


def _samples(engine: Engine, guarded: Iterable[tuple[Vm, Watch]]) -> dict[str, list[Sample]]:
    """One read for all that look equally far back."""
    windows: dict[float, list[str]] = {}
    for vm, watch in guarded:
        windows.setdefault(watch.policy.window, []).append(vm.uuid)
    found: dict[str, list[Sample]] = {}
    for window, uuids in windows.items():
        since = int(engine.clock() - window) - 1
        for sample in engine.store.samples.latest(engine.facts.name, since, uuids):
            found.setdefault(sample.uuid, []).append(sample)
    return found
