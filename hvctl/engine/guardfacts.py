"""What a guard goes by, in one look at a VM: what samples and forecasts say of each resource, and what its disks
take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from hvctl.decide import guardmeasures
from hvctl.decide.afterstart import demand
from hvctl.decide.exhaustion import recent
from hvctl.decide.growth import FULL
from hvctl.decide.reservations import UNLIMITED, room
from hvctl.decide.victims import MIB
from hvctl.engine.diskuse import filled
from hvctl.engine.guardcosts import cost_of, refusal_of
from hvctl.engine.guardhost import HostLook
from hvctl.errors import HvctlError
from hvctl.model.allocation import Resources, resources
from hvctl.model.guard import Act, GuardFacts, GuardPolicy, GuardState, Measure, Points
from hvctl.model.meter import VmReading
from hvctl.model.operation import OpState
from hvctl.model.sample import Sample
from hvctl.model.vm import Disk, Vm
from hvctl.units import moment

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine

_REMEMBERED: Final = 50  # operations of the VM that costs are learned from


class VmLook:
    """One look at one VM."""

    def __init__(self, engine: Engine, host: HostLook, vm: Vm, policy: GuardPolicy, state: GuardState) -> None:
        self._engine, self._vm, self._policy, self._state = engine, vm, policy, state
        self._at = engine.clock()
        self._host = host
        self._now = host.readings.get(vm.uuid, VmReading(vm.uuid, vm.name, ""))
        name, store = engine.facts.name, engine.store
        self._samples = host.samples.get(vm.uuid, ())
        self._done = [o for o in store.operations(name, vm.uuid, OpState.DONE, limit=_REMEMBERED) if o.closed_at]
        taken = engine.host.machine.snapshots(vm.uuid) if policy.to else ()
        self._snapshot = next((s for s in taken if policy.to in (s.name, s.id)), None)
        self.looks: dict[str, Points] = {}
        """What the next look needs of this one."""

    def facts(self) -> GuardFacts:
        room_left, resident = self._room(), self._amounts("resident", _resident)
        found = (self._memory(resident, room_left), self._resident(resident), self._connections())
        measures = [*self._rates(room_left), *(m for m in found if m is not None), *self._disks()]
        engine, vm, snapshot = self._engine, self._vm, self._snapshot
        costs = {a.part: cost_of(a, self._done, self._policy.to, snapshot, self._at) for a in self._policy.allow}
        refused = {a.part: why for a in self._policy.allow if (why := refusal_of(engine, vm, a)) is not None}
        if vm.uuid in self._host.interrupted:
            refused = dict.fromkeys(costs, f"{vm.name} is interrupted")
        elif self._policy.to and snapshot is None:
            missing = f"{vm.name} has no snapshot {self._policy.to}"
            refused |= {a.part: missing for a in self._policy.allow if a.act.needs_snapshot}
        return GuardFacts(self._vm.name, self._at, tuple(measures), costs, refused)

    # --- resources

    def _points(self, value: Callable[[Sample], float | None]) -> Points:
        return self._recent(tuple((float(s.at), v) for s in self._samples if (v := value(s)) is not None))

    def _amounts(self, key: str, value: Callable[[Sample | VmReading], float | None]) -> Points:
        """Of what is no rate, what it is now counts too: a collector that is late has a gap where this has none. The
        guard keeps what it saw itself."""
        now = value(self._now)
        own = self._recent((*self._state.looks.get(key, ()), *(() if now is None else ((self._at, float(now)),))))
        self.looks[key] = own
        return self._recent(tuple(sorted({*self._points(value), *own})))

    def _recent(self, points: Points) -> Points:
        return recent(points, self._at - self._policy.window, self._state.memory.since(self._at))

    def _quantiles(self, resource: str, factor: float) -> tuple[tuple[float, float], ...]:
        one = self._host.forecasts.get(self._vm.uuid, {}).get(resource)
        return () if one is None else ((one.quantile, one.peak * factor),)

    def _room(self) -> Resources:
        """What the VM may have on this host in all."""
        vm, host = self._vm, self._host
        mine = room(host.capacity, host.held, host.reservations, frozenset({vm.uuid, vm.name}), self._at)
        return mine.largest(resources(vm.allocation))

    def _rates(self, room_left: Resources) -> list[Measure]:
        """CPU, and what is throttled; what has no limit cannot run out."""
        vm, has = self._vm, self._vm.allocation
        written = [has.disk(d.target) for d in vm.disks if d.writable]
        taps = [has.nic(n.mac) for n in vm.nics]
        found = [guardmeasures.cpu(vm, self._points(lambda s: s.cpu), room_left, self._quantiles("cpu", 1.0))]
        for name, unit, limits, most, value, quantiles in (
            ("iops", "1/s", [d.iops for d in written], float(room_left.iops), _iops, self._quantiles("iops", 1.0)),
            (
                "disk-rate",
                "bytes/s",
                [d.rate for d in written],
                float(UNLIMITED),
                _disk_rate,
                self._quantiles("disk", 1e3),
            ),
            ("net-in", "bit/s", [n.inbound for n in taps], float(room_left.network), _received, ()),
            ("net-out", "bit/s", [n.outbound for n in taps], float(room_left.network), _sent, ()),
        ):
            known = [v for v in limits if v is not None]
            if known and len(known) == len(limits):
                found.append(Measure(name, unit, self._points(value), sum(known) * FULL, (), most * FULL, quantiles))
        return found

    def _memory(self, resident: Points, room_left: Resources) -> Measure | None:
        """It runs out where the guest says so and the host sees as much held: None without the guest's word."""
        vm, margin = self._vm, self._engine.settings.memory_margin
        claimed = self._amounts("memory as the guest says", _used)
        if not claimed or not vm.has_balloon:
            return None
        then = self._used_at_snapshot() if any(a.act is Act.WHOLE for a in self._policy.allow) else None
        after = {} if then is None else {Act.WHOLE.value: then}
        return guardmeasures.memory(vm, resident, claimed, room_left, margin, self._quantiles("memory", MIB), after)

    def _used_at_snapshot(self) -> float | None:
        """What the guest used when the snapshot was taken, as the five-minute row of that time has it."""
        if self._snapshot is None:
            return None
        at = int(moment(self._snapshot.created_at))
        column = "memory_used_mean"
        rows = self._engine.store.samples.series(
            at - 300, at + 300, host=self._engine.facts.name, uuids=[self._vm.uuid], columns=(column,)
        )
        return next((float(v) for v in rows[column] if v is not None), None)

    def _resident(self, points: Points) -> Measure | None:
        """What the process holds of the host's memory, against its part and against what the host has left."""
        if not points:
            return None
        after = {}
        if self._now.usable is not None and self._now.unused is not None:
            cache = max(0.0, self._now.usable - self._now.unused)
            after[Act.CACHE.value] = max(0.0, points[-1][1] - cache)
        return guardmeasures.resident(points, self._host.available, self._policy.resident, after)

    def _connections(self) -> Measure | None:
        if self._policy.connections is None:
            return None
        points = self._amounts("connections", lambda s: s.connections)
        if not points:
            return None
        return Measure(
            "connections", "connections", points, float(self._policy.connections), after={Act.NET.value: 0.0}
        )

    def _disks(self) -> list[Measure]:
        """The disks that the policy has to do with, and the file system that they lie on."""
        concerned = {d.target: (d, parts) for d in self._vm.disks if d.writable and (parts := self._parts_of(d))}
        claims = filled(self._engine.host, self._vm) if concerned else {}
        found, taken, left = [], 0, 0
        freed: dict[str, int] = {}
        for target, (disk, parts) in concerned.items():
            try:
                space = self._engine.host.storage.space(disk, self._snapshot.tag if self._snapshot else None)
            except HvctlError:
                continue
            key = f"disk:{disk.name or target}"
            after = {} if space.after is None else {part: float(space.after) for part in parts}
            full = space.size * self._policy.disk_full
            said = claims.get(target)
            claimed = () if said is None else self._seen(f"{key} as the guest says", said * space.size)
            found.append(Measure(key, "bytes", self._seen(key, space.taken), full, claimed, after=after))
            taken, left = taken + space.taken, space.left
            for part in after:
                freed[part] = freed.get(part, 0) + max(0, space.taken - int(after[part]))
        if found:
            after = {part: float(taken - free) for part, free in freed.items()}
            found.append(Measure("storage", "bytes", self._seen("storage", taken), float(taken + left), after=after))
        return found

    def _parts_of(self, disk: Disk) -> list[str]:
        """What the policy allows that brings back this disk as a whole."""
        names = (f"disk:{disk.target}", f"disk:{disk.name}", Act.WHOLE.value)
        return [a.part for a in self._policy.allow if a.part in names]

    def _seen(self, key: str, value: float) -> Points:
        """No sample has what disks take: the guard keeps what it saw."""
        points = self._recent((*self._state.looks.get(key, ()), (self._at, float(value))))
        self.looks[key] = points
        return points


def _resident(seen: Sample | VmReading) -> float | None:
    return seen.rss


def _used(seen: Sample | VmReading) -> float | None:
    """As a sample has it: all that the guest has, less what it could give to who asks."""
    if isinstance(seen, Sample):
        return seen.memory_used
    return None if seen.available is None or seen.usable is None else max(0, seen.available - seen.usable)


def _iops(s: Sample) -> float | None:
    return demand(s, "iops")


def _disk_rate(s: Sample) -> float | None:
    rate = demand(s, "disk")
    return None if rate is None else rate * 1e3


def _received(s: Sample) -> float | None:
    return None if s.net_rx_bytes is None else s.net_rx_bytes * 8


def _sent(s: Sample) -> float | None:
    return None if s.net_tx_bytes is None else s.net_tx_bytes * 8
