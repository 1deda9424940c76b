"""What a decision about interruptions goes by: every VM with its promise, its guest's word, its history in the journal
and its predicted need, joined in one look."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hvctl.decide.admission import holders
from hvctl.decide.interrupt import Facts
from hvctl.decide.victims import Seen
from hvctl.engine.handover import capacity
from hvctl.engine.iops import lately
from hvctl.engine.observe import balloon_of, observe_all
from hvctl.model.allocation import Record, Resources, resources
from hvctl.model.host import Ledger
from hvctl.model.operation import Kind, Operation, OpState
from hvctl.model.pool import Rung
from hvctl.model.vm import State, Vm
from hvctl.units import moment

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine

_KEEPING = (Kind.CREATE, Kind.START, Kind.RESUME, Kind.SNAPSHOT_TAKE, Kind.SNAPSHOT_SAVE, Kind.SNAPSHOT_LOAD)
"""After one of these less work is lost."""
_REMEMBERED = 2000


def interruption_facts(engine: Engine, back: float) -> Facts:
    """back: seconds until the victims return, for which their need is predicted."""
    observed = observe_all(engine.host)
    ledger = engine.store.ledger(engine.facts.name)
    held = holders(ledger, observed)
    past = engine.store.operations(engine.facts.name, state=OpState.DONE, limit=_REMEMBERED)
    had, iops = lasting(engine), lately(engine)
    seen = tuple(
        seen_of(engine, vm, back, held.get(vm.uuid, ("", Resources()))[1], ledger, past, had, iops) for vm in observed
    )
    return Facts(capacity(engine), held, ledger.reservations, seen, engine.settings.memory_margin, engine.clock())


def seen_of(
    engine: Engine,
    vm: Vm,
    back: float,
    holds: Resources,
    ledger: Ledger,
    past: Sequence[Operation],
    had: Mapping[str, Record],
    iops: Mapping[str, Sequence[int]],
) -> Seen:
    running = vm.state is State.RUNNING
    wanted = vm.record is not None and running and (vm.record.interruptible or not vm.protected)
    mine = [o for o in past if o.vm_uuid == vm.uuid]
    return Seen(
        vm,
        holds if holds.any else resources(vm.allocation),
        engine.needs(vm, back),
        balloon=balloon_of(engine.host, vm) if wanted and vm.has_balloon else None,
        age=_age(engine.clock(), mine),
        restart=_restarts(mine),
        snapshots=len(engine.host.machine.snapshots(vm.uuid)) if wanted else 0,
        had=had.get(vm.uuid),
        iops=max(iops[vm.uuid]) if vm.uuid in iops else None,
        busy=any(p.busy for p in ledger.promised if p.vm_uuid == vm.uuid),
    )


def lasting(engine: Engine) -> dict[str, Record]:
    """What VMs had that are interrupted now, or that gave of theirs and have not got it again."""
    had: dict[str, Record] = {}
    for one in engine.store.pool.reservations(engine.facts.name, ended=True):
        for neighbour in one.errand.neighbours if one.errand else ():
            had.setdefault(neighbour.vm_uuid, neighbour.had)
    return had | {a.vm_uuid: a.had for a in engine.store.pool.away(engine.facts.name)}


def _age(now: float, mine: Sequence[Operation]) -> float | None:
    ends = [moment(o.closed_at) for o in mine if o.kind in _KEEPING and o.closed_at]
    return max(0.0, now - max(ends)) if ends else None


def _restarts(mine: Sequence[Operation]) -> dict[Rung, float]:
    took: dict[Rung, list[float]] = {}
    for operation in mine:
        if operation.kind is Kind.RESUME and operation.closed_at and operation.request.get("rung") in set(Rung):
            seconds = moment(operation.closed_at) - moment(operation.opened_at)
            took.setdefault(Rung(operation.request["rung"]), []).append(seconds)
    return {rung: statistics.median(seconds) for rung, seconds in took.items()}
