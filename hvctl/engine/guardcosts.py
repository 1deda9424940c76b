"""What an action of a guard costs, from the journal's own measurements of its kind on the VM, and why it cannot be done
now, as far as that is told without trying."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hvctl import codec
from hvctl.decide.guard import DEFAULT_COSTS
from hvctl.decide.guardpolicy import scope_of
from hvctl.decide.reclaim import reclaim_refusal
from hvctl.decide.reset import refuse_unready
from hvctl.model.guard import Act, Allowed, Cost
from hvctl.model.operation import Kind, Operation
from hvctl.model.reset import WHOLE
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm
from hvctl.units import moment

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine


def cost_of(allowed: Allowed, done: Sequence[Operation], to: str | None, snapshot: Snapshot | None, at: float) -> Cost:
    """done: the VM's operations that were done, with their ends; to: the snapshot's name."""
    if allowed.act is Act.GROW:
        return _measured(allowed, [_seconds(o) for o in done if o.kind is Kind.ALLOCATE], 0.0)
    like = _resets(done, codec.dump(scope_of(allowed.part)))
    if not allowed.act.needs_snapshot:
        return _measured(allowed, [_paused(o) for o in like], 0.0)
    # Since what goes back was last as it is in the snapshot.
    fresh = [moment(o.closed_at or "") for o in (*like, *_resets(done, codec.dump(WHOLE))) if o.request.get("to") == to]
    fresh += [moment(snapshot.created_at)] if snapshot else []
    work = max(0.0, at - max(fresh)) if fresh else 0.0
    cost = _measured(allowed, [_paused(o) for o in like], work)
    takes = [_paused(o) for o in done if o.kind is Kind.SNAPSHOT_TAKE]
    return replace(cost, take=statistics.median(takes), taken=len(takes)) if takes else cost


def refusal_of(engine: Engine, vm: Vm, allowed: Allowed) -> str | None:
    if vm.state is not State.RUNNING:
        return f"{vm.name} is {vm.state}"
    if allowed.act is Act.GROW:
        return None
    if vm.protected:
        return f"{vm.name} is protected"
    if allowed.act is Act.CACHE:
        refusal = reclaim_refusal(vm)
        if refusal is None and not engine.host.domains.balloon(vm.uuid).reported:
            return "the guest does not report its memory, so nobody knows what it can give"
        return refusal.message if refusal else None
    unready = refuse_unready(vm) if allowed.act.needs_snapshot else None
    return unready.message if unready else None


def _resets(done: Sequence[Operation], scope: object) -> list[Operation]:
    like = (o for o in done if o.kind is Kind.RESET and o.request.get("scope") == scope)
    return [o for o in like if not o.before.get("plugs")]  # a guard unplugs nothing


def _measured(allowed: Allowed, took: list[float], work: float) -> Cost:
    if not took:
        return Cost(DEFAULT_COSTS[allowed.act], 0, work)
    return Cost(statistics.median(took), len(took), work)


def _paused(operation: Operation) -> float:
    """Seconds that the guest was stopped; where it ran on, all of the operation counts."""
    paused = (operation.result or {}).get("paused")
    return _seconds(operation) if paused is None else float(paused)


def _seconds(operation: Operation) -> float:
    return max(0.0, moment(operation.closed_at or "") - moment(operation.opened_at))
