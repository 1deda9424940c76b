"""Carrying a demand to its end: neighbours shrink, victims go one after the other, and the demand holds what it
asked for, or nothing. Everything that is still to be done stands in its row, so that anybody may carry it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hvctl.decide.interrupt import Ask, Interruption, plan_interruption
from hvctl.decide.returning import wanted_return
from hvctl.engine.facts import interruption_facts
from hvctl.engine.handover import capacity, room_for
from hvctl.engine.lock import vm_lock
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, NotFoundError, RefusedError, UndoneError
from hvctl.model.allocation import Change
from hvctl.model.host import Ledger
from hvctl.model.operation import Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Errand, Held, Neighbour, Reservation
from hvctl.operations.allocate import allocate
from hvctl.operations.pool import fresh, release
from hvctl.operations.victim import interrupt_one

TRIES = 5
_ENDS_BY_ITSELF = (RefusedError, UndoneError, NotFoundError)


@dataclass
class Progress:
    """What was done for a demand in this run."""

    outcomes: list[Outcome] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def carry_on(engine: Engine, number: int, done: Progress, wait: float | None = None) -> Reservation:
    """Until it holds all of it. RefusedError: that cannot be had any more; then it holds nothing, and who went for it
    is due. Any other error: it stays as it is, and `hvctl recover` carries it on. BusyError: somebody else does."""
    seconds = engine.settings.lock_wait if wait is None else wait
    with vm_lock(engine.settings.locks_dir, f"demand-{number}", seconds):
        demand = engine.store.pool.reservation(number)
        tried = _gone_for(engine, number, returned=True)
        for _ in range(TRIES):
            if demand.state is not Held.WAITING or demand.errand is None:
                break
            _shrink(engine, demand.errand, done)
            _regrant(engine, demand)
            engine.faults.point("demand", "shrunk", "after")
            _victims(engine, demand, tried, done)
            engine.faults.point("demand", "gone", "before")
            demand = _grown(engine, number)
            engine.faults.point("demand", "gone", "after")
            if demand.state is Held.WAITING:
                demand = _again(engine, demand, frozenset(tried))
        if demand.state is Held.WAITING:
            why = f"its victims did not go, {TRIES} times in a row."
            give_up(engine, demand, why)
            raise RefusedError(f"the demand {number} was given up: {why}", "hvctl operation list")
        if demand.state is Held.ENDED:
            raise RefusedError(f"the demand {number} has ended.", "hvctl reserve list --all")
        return demand


def _victims(engine: Engine, demand: Reservation, tried: set[str], done: Progress) -> None:
    errand = demand.errand or Errand(0.0, 0.0, ())
    before = _gone_for(engine, demand.id, returned=True)
    kept = engine.store.pool.reservations(engine.facts.name)
    returns = {r.owner: r.id for r in kept if r.demand == demand.id}
    for uuid, rung in errand.victims:
        tried.add(uuid)
        now = engine.store.pool.reservation(demand.id)
        if uuid in before or now.state is not Held.WAITING:
            continue
        try:
            outcome = interrupt_one(
                engine, uuid, rung, back=errand.back, grace=errand.grace, reason=demand.reason, demand=now,
                returns=returns.get(uuid),
            )  # fmt: skip
        except _ENDS_BY_ITSELF as e:
            if uuid in _gone_for(engine, demand.id):
                continue  # a dead owner's interruption of it was ended on the way
            done.warnings.append(f"another victim is looked for: {e.message}")
            if uuid in returns:
                release(engine, returns[uuid])
            return
        done.outcomes.append(outcome)
        done.warnings += outcome.warnings


def _gone_for(engine: Engine, number: int, *, returned: bool = False) -> set[str]:
    """VMs that went for a demand; returned: those that are back, too."""
    return {a.vm_uuid for a in engine.store.pool.away(engine.facts.name, returned=returned) if a.demand == number}


def _grown(engine: Engine, number: int) -> Reservation:
    """With whatever is free by now, also what nobody gave it."""
    most, observed = capacity(engine), observe_all(engine.host)

    def edit(one: Reservation, ledger: Ledger) -> Reservation:
        if one.state is not Held.WAITING:
            return one
        got = room_for(engine, most, observed, ledger, one)
        granted = one.granted.largest(got).least(one.size)
        return replace(one, granted=granted, state=one.state if (one.size - granted).any else Held.HELD)

    return engine.store.pool.change(engine.facts.name, number, edit)


def _again(engine: Engine, demand: Reservation, tried: frozenset[str]) -> Reservation:
    """Other victims for what still lacks."""
    errand = demand.errand
    if errand is None:
        return demand
    facts = interruption_facts(engine, errand.back)
    seconds = None if demand.ends_at is None else demand.ends_at - facts.now
    ask = Ask(demand.size, demand.owner, seconds, errand.back, facts.now, errand.rungs, errand.grace,
              demand=demand.id, done=tried)  # fmt: skip
    plan = plan_interruption(facts, ask)
    if isinstance(plan, Refusal):
        give_up(engine, demand, plan.message)
        raise RefusedError(f"{plan.message} The demand {demand.id} was given up.", plan.hint)
    victims = tuple((t.seen.vm.uuid, t.rung) for t in plan.turns)
    more = tuple(Neighbour(s.seen.vm.uuid, s.seen.record, s.to) for s in plan.shrinks)
    errand = replace(errand, victims=victims, neighbours=(*errand.neighbours, *more))
    keep_returns(engine, [replace(r, demand=demand.id) for r in returns_of(engine, plan, demand.reason, errand.back)])
    return engine.store.pool.change(engine.facts.name, demand.id, lambda one, _: replace(one, errand=errand))


def returns_of(engine: Engine, plan: Interruption, reason: str, back: float) -> list[Reservation]:
    """What is to be kept for the victims' returns."""
    return [
        fresh(engine, wanted_return(uuid, size, plan.at + back, reason))
        for uuid, size in plan.returns.items()
        if size.any
    ]


def keep_returns(engine: Engine, wanted: list[Reservation]) -> tuple[Reservation, ...]:
    """As far as there is room."""
    most, observed = capacity(engine), observe_all(engine.host)
    return engine.store.pool.reserve(
        engine.facts.name,
        wanted,
        lambda ledger, one: room_for(engine, most, observed, ledger, one),
    )


def _end_returns(engine: Engine, demand: Reservation) -> None:
    """What is kept for the return of VMs that did not go."""
    gone = {a.vm_uuid for a in engine.store.pool.away(engine.facts.name)}
    for one in engine.store.pool.reservations(engine.facts.name):
        if one.demand == demand.id and one.owner not in gone:
            release(engine, one.id)


def give_up(engine: Engine, demand: Reservation, why: str) -> None:
    """It holds nothing any more, and who went for it may come back."""
    engine.progress(f"demand {demand.id} is given up: {why}")
    release(engine, demand.id)
    _end_returns(engine, demand)
    engine.store.pool.return_now(engine.facts.name, demand.id, engine.clock())


# --- neighbours


def _shrink(engine: Engine, errand: Errand, done: Progress) -> None:
    """A neighbour that does not give it after all is left alone: then less is held of the return."""
    for neighbour in errand.neighbours:
        change = Change(memory=neighbour.to.memory, cpu_quota=neighbour.to.cpu_quota)
        try:
            outcome = allocate(engine, neighbour.vm_uuid, change)
        except _ENDS_BY_ITSELF as e:
            done.warnings.append(f"a neighbour does not give what was planned: {e.message}")
            continue
        done.outcomes += [outcome] if outcome.operation else []


def _regrant(engine: Engine, demand: Reservation) -> None:
    """After neighbours gave, the returns hold what they were to hold."""
    if demand.errand is None or not demand.errand.neighbours:
        return
    most, observed = capacity(engine), observe_all(engine.host)

    def edit(one: Reservation, ledger: Ledger) -> Reservation:
        got = room_for(engine, most, observed, ledger, one)
        return replace(one, granted=one.granted.largest(got))

    for one in engine.store.pool.reservations(engine.facts.name):
        if one.demand == demand.id and one.state is Held.HELD:
            engine.store.pool.change(engine.facts.name, one.id, edit)


def restore_neighbours(engine: Engine, done: Progress) -> None:
    """Of demands whose victims are all back: who gave of theirs gets it again as soon as there is room."""
    host = engine.facts.name
    gone = {a.demand for a in engine.store.pool.away(host)}
    for one in engine.store.pool.reservations(host, ended=True):
        errand = one.errand
        going = one.state in (Held.WAITING, Held.SCHEDULED)
        if errand is None or not errand.neighbours or going or one.id in gone:
            continue
        left = tuple(n for n in errand.neighbours if not _restored(engine, n, done))
        if left != errand.neighbours:
            engine.store.pool.change(host, one.id, _with_neighbours(left))


def _with_neighbours(left: tuple[Neighbour, ...]) -> Callable[[Reservation, Ledger], Reservation]:
    def edit(one: Reservation, _: Ledger) -> Reservation:
        return one if one.errand is None else replace(one, errand=replace(one.errand, neighbours=left))

    return edit


def _restored(engine: Engine, neighbour: Neighbour, done: Progress) -> bool:
    had = neighbour.had.allocation
    try:
        vm = engine.host.domains.get(neighbour.vm_uuid)
        if vm.record is None or vm.record.allocation != neighbour.to:
            return True  # somebody gave it something else since
        outcome = allocate(engine, neighbour.vm_uuid, Change(memory=had.memory, cpu_quota=had.cpu_quota))
    except NotFoundError:
        return True
    except HvctlError as e:
        done.warnings.append(f"a neighbour does not have its own again yet: {e.message}")
        return False
    done.outcomes += [outcome] if outcome.operation else []
    return True


def waiting(engine: Engine) -> list[Reservation]:
    return [r for r in engine.store.pool.reservations(engine.facts.name) if r.state is Held.WAITING]


def finish(engine: Engine, done: Progress) -> list[Reservation]:
    """Carry on what dead owners left; what is somebody's is left to them."""
    ended = []
    for one in waiting(engine):
        try:
            ended.append(carry_on(engine, one.id, done, wait=0.0))
        except BusyError:
            continue
        except HvctlError as e:
            engine.progress(f"demand {one.id}: {e.message}")
    return ended
