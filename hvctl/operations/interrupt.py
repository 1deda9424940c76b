"""interrupt: resources of interruptible VMs go to who needs them more, and the VMs come back later.

A demand is a reservation. It begins with what is free, and grows in the very transaction that ends the interruption of
a VM which was seen to be off; so nothing is promised twice, and whoever carries it on after a crash finds in its row
what is still to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvctl.decide.interrupt import Ask, Interruption, in_words, plan_interruption
from hvctl.decide.reservations import Wanted
from hvctl.decide.returning import returning, wanted_return
from hvctl.engine.facts import interruption_facts
from hvctl.engine.handover import capacity, room_for
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError, NotFoundError, RefusedError, UndoneError
from hvctl.model.allocation import Resources, resources
from hvctl.model.host import Ledger
from hvctl.model.operation import Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Errand, Held, Neighbour, Reservation, Rung
from hvctl.operations.demand import Progress, carry_on, finish, keep_returns, returns_of
from hvctl.operations.pool import fresh, release, same_request
from hvctl.operations.victim import answered, interrupt_one


@dataclass(frozen=True, slots=True)
class Report:
    """How a demand went, or would go (demand None). scheduled: it is delayed until plan.at."""

    plan: Interruption | None
    demand: Reservation | None = None
    outcomes: tuple[Outcome, ...] = ()
    warnings: tuple[str, ...] = ()
    scheduled: bool = False


def for_need(engine: Engine, ask: Ask, *, dry_run: bool = False, key: str | None = None) -> Report:
    """Free what `ask` names, and hold it for its owner. RefusedError: it cannot be had."""
    done = Progress()
    if not dry_run:
        engine.sweep()
        finish(engine, done)
    if known := _of_key(engine, ask, key):
        return Report(None, known, tuple(done.outcomes), tuple(done.warnings), known.state is Held.SCHEDULED)
    facts = interruption_facts(engine, ask.back)
    plan = plan_interruption(facts, ask)
    if isinstance(plan, Refusal):
        raise RefusedError(plan.message, plan.hint)
    later = plan.at > facts.now
    if dry_run:
        return Report(plan, scheduled=later)
    demand = _held(engine, ask, plan, later, key)
    engine.faults.point("demand", "reserved", "after")
    if demand.state is Held.WAITING:
        demand = carry_on(engine, demand.id, done)
    warnings = (*done.warnings, *plan.given_up)
    return Report(plan, demand, tuple(done.outcomes), warnings, demand.state is Held.SCHEDULED)


def _of_key(engine: Engine, ask: Ask, key: str | None) -> Reservation | None:
    """The demand that this key was used for; RefusedError if that was another one."""
    if key is None:
        return None
    every = engine.store.pool.reservations(engine.facts.name, ended=True)
    known = next((r for r in every if r.key == key), None)
    if known is not None and known.state is Held.ENDED:
        raise RefusedError(f"the demand {known.id} with this key has ended.", "use a new --key")
    if known is not None:
        same_request(known, ask.owner, ask.need)
    return known


def _held(engine: Engine, ask: Ask, plan: Interruption, later: bool, key: str | None) -> Reservation:
    """The demand's reservation with as much as is free, and one for each victim's return, in one transaction."""
    reason = f"interruption: {plan.reasons[0]}" if plan.reasons else "interruption"
    ends = None if ask.seconds is None else plan.at + ask.seconds
    errand = Errand(
        ask.back, ask.grace, ask.rungs, tuple((t.seen.vm.uuid, t.rung) for t in plan.turns),
        tuple(Neighbour(s.seen.vm.uuid, s.seen.record, s.to) for s in plan.shrinks),
    )  # fmt: skip
    state = Held.SCHEDULED if later else Held.WAITING if plan.turns else Held.HELD
    wanted = Wanted(ask.owner, reason, ask.need, plan.at, ends)
    demand = replace(fresh(engine, wanted, state), errand=errand)
    returns = returns_of(engine, plan, reason, ask.back)
    most, observed = capacity(engine), observe_all(engine.host)

    def grant(ledger: Ledger, one: Reservation) -> Resources:
        if one.state is Held.SCHEDULED:
            return Resources()
        got = room_for(engine, most, observed, ledger, one)
        if one.state is Held.HELD and one.owner == ask.owner and (lacking := one.size - got).any:
            raise RefusedError(f"{in_words(lacking)} was free a moment ago, and is not any more.", "try again")
        return got

    made = engine.store.pool.reserve(engine.facts.name, (demand, *([] if later else returns)), grant, key)
    return made[0]


def due(engine: Engine, *, dry_run: bool = False) -> list[Report]:
    """Begin the demands whose time has come."""
    reports = []
    for one in engine.store.pool.reservations(engine.facts.name):
        if one.state is not Held.SCHEDULED or one.starts_at > engine.clock() or one.errand is None:
            continue
        seconds = None if one.ends_at is None else one.ends_at - engine.clock()
        errand = one.errand
        ask = Ask(one.size, one.owner, seconds, errand.back, engine.clock(), errand.rungs, errand.grace)
        try:
            reports.append(for_need(engine, ask, dry_run=dry_run, key=f"{one.key or 'scheduled'}-{one.id}"))
        except HvctlError as e:
            engine.progress(f"demand {one.id} waits: {e.message}")
            continue
        if dry_run:
            continue
        engine.store.pool.change(
            engine.facts.name, one.id, lambda r, _: replace(r, state=Held.ENDED, closed_at=r.starts_at)
        )
    return reports


def vms(
    engine: Engine,
    refs: Sequence[str],
    rung: Rung,
    *,
    back: float,
    grace: float,
    reason: str,
    dry_run: bool = False,
    key: str | None = None,
) -> list[Outcome]:
    """Interrupt these VMs, for nobody in particular; room for their return is kept as far as there is any. Who cannot
    be interrupted is refused before anybody is."""
    keys = {ref: f"{key}-{ref}" for ref in refs} if key else {}

    def one(ref: str, returns: int | None = None, dry_run: bool = True) -> Outcome:
        return interrupt_one(
            engine, ref, rung, back=back, grace=grace, reason=reason, returns=returns, dry_run=dry_run,
            key=keys.get(ref),
        )  # fmt: skip

    known = {ref: known for ref in refs if (known := answered(engine, ref, rung, reason, keys.get(ref)))}
    planned = [one(ref) for ref in refs if ref not in known]
    if dry_run:
        return planned
    outcomes = []
    for ref in refs:
        if ref in known:
            outcomes.append(known[ref])
            continue
        returns = _return_of(engine, ref, rung, back)
        try:
            outcome = one(ref, returns.id, dry_run=False)
        except (RefusedError, UndoneError):
            release(engine, returns.id)
            raise
        if not outcome.plan:
            # The same request did it a moment ago, and has kept the room already.
            release(engine, returns.id)
        elif (short := returns.size - returns.granted).any:
            outcome = replace(outcome, warnings=(*outcome.warnings, f"{in_words(short)} of its return is not held"))
        outcomes.append(outcome)
    return outcomes


def _return_of(engine: Engine, ref: str, rung: Rung, back: float) -> Reservation:
    facts = interruption_facts(engine, back)
    seen = next((s for s in facts.seen if ref in (s.vm.name, s.vm.uuid)), None)
    if seen is None:
        raise NotFoundError(f"there is no VM {ref}.", "hvctl vm list")
    size = resources(returning(seen, rung))
    wanted = fresh(engine, wanted_return(seen.vm.uuid, size, facts.now + back))
    (made,) = keep_returns(engine, [wanted])
    return made
