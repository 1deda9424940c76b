"""One VM of an interruption: told, taken off its resources on its rung, and noted as away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvctl.decide.admission import holders
from hvctl.decide.away import plan_away
from hvctl.decide.returning import returning
from hvctl.decide.victims import Seen, refusal_of, squeezed
from hvctl.engine.facts import lasting, seen_of
from hvctl.engine.iops import lately
from hvctl.engine.operate import Decision, Engine
from hvctl.model.allocation import Resources
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Away, Reservation, Rung
from hvctl.model.vm import Vm


def interrupt_one(
    engine: Engine,
    ref: str,
    rung: Rung,
    *,
    back: float,
    grace: float,
    reason: str,
    demand: Reservation | None = None,
    returns: int | None = None,
    dry_run: bool = False,
    key: str | None = None,
) -> Outcome:
    """The VM is looked at anew: it may have been protected, or have changed, since it was chosen."""

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.", "hvctl vm list")
        seen = _seen(engine, vm, back)
        refusal = refusal_of(replace(seen, busy=False), "" if demand is None else demand.owner, frozenset())
        if refusal is not None:
            return refusal
        record, now = seen.record, engine.clock()
        margin = engine.settings.memory_margin
        lacking = None if demand is None else demand.size - demand.granted
        goal = record.with_allocation(squeezed(seen, margin, lacking)) if rung is Rung.SQUEEZE else record
        back_with = record.with_allocation(returning(seen, rung))
        away = Away(
            vm.uuid, vm.name, rung, seen.whole, goal.allocation, back_with, now, now + back, reason, seen.need.reason,
            demand=None if demand is None else demand.id, returns=returns, predicted=seen.need.peaks,
        )  # fmt: skip
        snapshots = tuple(reversed(engine.host.machine.snapshots(vm.uuid, hidden=True)))
        plan = plan_away(vm, away, goal, seen.balloon, snapshots, grace=grace, margin=margin)
        if isinstance(plan, Refusal):
            return plan
        left = Resources(memory=seen.holds.memory) if rung is Rung.PAUSE else None
        holds = not rung.ends_process
        before = Before(vm=vm, goal=goal, holds=holds, away=away, left=left, grace=grace)
        result = {"rung": rung.value, "returns_at": away.return_at, "demand": away.demand, "forecast": away.forecast}
        return Decision(plan, before, goal=goal, holds=holds, result=result)

    if dry_run:
        return engine.preview(Kind.INTERRUPT, ref, ref, decide)
    return engine.change(Kind.INTERRUPT, ref, _request(rung, reason, demand), decide, key=key)


def answered(engine: Engine, ref: str, rung: Rung, reason: str, key: str | None) -> Outcome | None:
    """What this interruption with this key was answered before."""
    return engine.answered(Kind.INTERRUPT, ref, _request(rung, reason, None), key)


def _request(rung: Rung, reason: str, demand: Reservation | None) -> dict[str, Any]:
    return {"rung": rung.value, "demand": None if demand is None else demand.id, "reason": reason}


def _seen(engine: Engine, vm: Vm, back: float) -> Seen:
    ledger = engine.store.ledger(engine.facts.name)
    holds = holders(ledger, [vm]).get(vm.uuid, ("", Resources()))[1]
    return seen_of(engine, vm, back, holds, ledger, (), lasting(engine), lately(engine, [vm.uuid]))
