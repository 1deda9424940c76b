"""Which VMs are interrupted for a demand, how gently, in which order, and whether they can come back: facts in, an
Interruption or a Refusal out.

The order of what is done keeps the sum within capacity at every moment: first neighbours shrink, then victims go, and
the demand grows only into what was seen to be free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hvctl.decide.admission import FORMAT
from hvctl.decide.reservations import COUNTED, FOREVER, UNLIMITED, Holders, in_force, owned, room, total
from hvctl.decide.returning import returning
from hvctl.decide.shrink import Shrink, shrinks
from hvctl.decide.victims import LADDER, Seen, cost_of, left, possible, refusal_of, weights_of
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.host import Capacity
from hvctl.model.plan import Refusal
from hvctl.model.pool import Held, Reservation, Rung
from hvctl.packing.choose import cheapest_cover
from hvctl.packing.cover import Candidate, Cover

HOUR = 3600.0
Choose = Callable[[Sequence[Candidate], Mapping[str, Resources]], Cover | None]


@dataclass(frozen=True, slots=True)
class Ask:
    """A demand: `need` in total for `owner`, for `seconds` (None: until released). Victims come back after `back`
    seconds. until: the moment up to which it may be delayed so that they can (None: as long as it takes); over: it is
    not delayed beyond that, whatever is given up. rungs are those that may be used; within: seconds there are."""

    need: Resources
    owner: str
    seconds: float | None = None
    back: float = HOUR
    until: float | None = None
    rungs: tuple[Rung, ...] = (Rung.SQUEEZE, Rung.PAUSE, Rung.SAVE)
    grace: float = 30.0
    within: float | None = None
    demand: int | None = None
    done: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """One host at one moment; held is what is promised to whom (admission.holders)."""

    capacity: Capacity
    held: Holders
    reservations: Sequence[Reservation]
    seen: Sequence[Seen]
    margin: int
    now: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One victim: how, what it gives, what it is left with, what it comes back with, and why it was chosen."""

    seen: Seen
    rung: Rung
    gives: Resources
    left: Resources
    goal: Allocation
    cost: float
    why: str


@dataclass(frozen=True, slots=True)
class Interruption:
    """What is done for a demand, in order. at: when it begins, later than now if victims could not come back otherwise.
    given_up says what is not held of their return. rejected are VMs that are no victims, and why."""

    at: float
    turns: tuple[Turn, ...] = ()
    shrinks: tuple[Shrink, ...] = ()
    reasons: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    bound: float = 0.0
    returns: Mapping[str, Resources] = field(default_factory=dict)


def in_words(amount: Resources) -> str:
    return ", ".join(f"{n} {text(v)}" for n, text in FORMAT.items() if (v := getattr(amount, n))) or "nothing"


def own_room(facts: Facts, ask: Ask, start: float, end: float) -> Resources:
    """What the demand may still get from start to end, beside what its owner has reserved otherwise."""
    own = _own(facts, ask.owner)
    mine = [r for r in owned(facts.reservations, own) if r.id != ask.demand]
    free = room(facts.capacity, facts.held, facts.reservations, own, start, end)
    return free - total(mine, start)


def _own(facts: Facts, owner: str) -> frozenset[str]:
    same = {u for u, (name, _) in facts.held.items() if owner in (u, name)}
    return frozenset({owner, *same, *(facts.held[u][0] for u in same)})


def plan_interruption(facts: Facts, ask: Ask, choose: Choose = cheapest_cover) -> Interruption | Refusal:
    """choose takes victims of those that may be; replay puts other choices beside the cheapest."""
    end = FOREVER if ask.seconds is None else facts.now + ask.seconds
    free = own_room(facts, ask, facts.now, end)
    lacking = ask.need - free
    uncounted = [n for n in COUNTED if getattr(ask.need, n) and getattr(facts.capacity, n) is None]
    notes = tuple(f"{n} is not counted on this host" for n in uncounted)
    if not lacking.any:
        return Interruption(facts.now, reasons=(f"{in_words(ask.need)} is free", *notes))
    rejected = tuple(
        (s.vm.name, no.message) for s in facts.seen if (no := refusal_of(s, ask.owner, ask.done)) is not None
    )
    named = {name for name, _ in rejected}
    able = [s for s in facts.seen if s.vm.name not in named]
    chosen = _victims(facts, ask, able, lacking, choose)
    if chosen is None:
        most = sum((s.holds for s in able), Resources())
        why = "; ".join(message.removesuffix(".") for _, message in rejected[:5])
        return Refusal(
            f"this host cannot free {in_words(lacking)} by interruptions: those that may be interrupted hold "
            f"{in_words(most)} together{f' ({why})' if why else ''}.",
            "hvctl vm set VM --interruptible, or allow more with --how shutdown",
        )
    turns, bound = chosen
    reason = f"{in_words(lacking)} lacks of {in_words(ask.need)} for {ask.owner}"
    found = Interruption(facts.now, turns, reasons=(reason, *notes), rejected=rejected, bound=bound)
    return _returning(facts, ask, found)


def _victims(
    facts: Facts, ask: Ask, able: Sequence[Seen], lacking: Resources, choose: Choose
) -> tuple[tuple[Turn, ...], float] | None:
    """The cheapest cover on the lowest rung that has one; then each of its members on the lowest rung that does."""
    for rung in (r for r in LADDER if r in ask.rungs):
        turns = [t for s in able if (t := _turn(facts, ask, s, rung, lacking)) is not None]
        candidates = [Candidate(t.seen.vm.uuid, "", t.cost, t.gives) for t in turns]
        cover = choose(candidates, {"": lacking})
        if cover is not None:
            chosen = [t for t in turns if t.seen.vm.uuid in cover.keys]
            return _gentler(facts, ask, chosen, lacking), cover.bound
    return None


def _turn(facts: Facts, ask: Ask, seen: Seen, rung: Rung, lacking: Resources) -> Turn | None:
    """On the highest rung up to `rung` that there is time for; None if there is none, or it gives nothing."""
    usable = [r for r in LADDER if r in ask.rungs and possible(seen, r, ask.grace, ask.within)]
    upto = [r for r in usable if LADDER.index(r) <= LADDER.index(rung)]
    if not upto:
        return None
    return _on(facts, ask, seen, upto[-1], lacking)


def _on(facts: Facts, ask: Ask, seen: Seen, rung: Rung, lacking: Resources) -> Turn | None:
    rest = left(seen, rung, facts.margin, lacking)
    gives = seen.holds - rest
    if not gives.any:
        return None
    goal = returning(seen, rung)
    available = _available(facts, ask, seen)
    weights = weights_of(seen, rung, available)
    why = (
        f"priority {weights.priority}, {weights.restart:.0f} s to return, {weights.lost:.0f} s of work lost, "
        f"{available:.0%} of its need there at return ({seen.need.reason})"
    )
    return Turn(seen, rung, gives, rest, goal, cost_of(weights), why)


def _available(facts: Facts, ask: Ask, seen: Seen) -> float:
    """The share of its need that the pool has at its return when it alone goes."""
    at = facts.now + ask.back
    there = room(facts.capacity, facts.held, facts.reservations, frozenset({seen.vm.uuid, seen.vm.name}), at)
    there -= _demanded(facts, ask, at)
    need = seen.need.resources
    shares: list[float] = [getattr(there, n) / getattr(need, n) for n in COUNTED if getattr(need, n)]
    return min([1.0, *shares])


def _demanded(facts: Facts, ask: Ask, at: float) -> Resources:
    """What of the demand lasts until the return, beyond what is counted for its owner already."""
    if ask.seconds is not None and facts.now + ask.seconds <= at:
        return Resources()
    own = _own(facts, ask.owner)
    has = sum((r for u, (_, r) in facts.held.items() if u in own), Resources())
    counted = sum((in_force(r, at) for r in owned(facts.reservations, own)), Resources())
    return ask.need - has.largest(counted)


def _gentler(facts: Facts, ask: Ask, chosen: list[Turn], lacking: Resources) -> tuple[Turn, ...]:
    """Each on the lowest rung with which the whole still suffices, the dearest first."""
    turns = {t.seen.vm.uuid: t for t in chosen}
    for turn in sorted(chosen, key=lambda t: (-t.cost, t.seen.vm.uuid)):
        others = sum((t.gives for u, t in turns.items() if u != turn.seen.vm.uuid), Resources())
        for rung in LADDER[: LADDER.index(turn.rung)]:
            if rung not in ask.rungs or not possible(turn.seen, rung, ask.grace, ask.within):
                continue
            lower = _on(facts, ask, turn.seen, rung, lacking)
            if lower is not None and not (lacking - (others + lower.gives)).any:
                turns[turn.seen.vm.uuid] = lower
                break
    return tuple(sorted(turns.values(), key=lambda t: (t.cost, t.seen.vm.name)))


# --- coming back


def _returning(facts: Facts, ask: Ask, found: Interruption) -> Interruption | Refusal:
    """With room for every victim at its return: as things are, or after neighbours shrank, or later, or not."""
    needs = {t.seen.vm.uuid: _resources_of(t) for t in found.turns}
    lacks = _lacks_at(facts, ask, found, needs, facts.now)
    if not lacks.any:
        return replace(found, returns=needs)
    victims = frozenset(t.seen.vm.uuid for t in found.turns)
    made, short = shrinks([s for s in facts.seen if s.vm.uuid not in victims], lacks, facts.margin)
    if not short.any:
        names = ", ".join(s.seen.vm.name for s in made)
        reason = f"{in_words(lacks)} would lack at their return: {names} gives it"
        return replace(found, returns=needs, shrinks=made, reasons=(*found.reasons, reason))
    later = _later(facts, ask, found, needs)
    if later is not None and (ask.until is None or later <= ask.until):
        reason = f"{in_words(lacks)} would lack at their return now"
        return replace(found, at=later, returns=needs, reasons=(*found.reasons, reason))
    if ask.until is None:
        names = ", ".join(t.seen.vm.name for t in found.turns)
        return Refusal(
            f"{names} could not come back: {in_words(lacks)} would lack, of which neighbours could give "
            f"{in_words(lacks - short)}, and no time is known at which it would not.",
            "--by TIME interrupts by then all the same",
        )
    held, given_up = _partly(needs, found.turns, lacks)
    return replace(found, returns=held, given_up=given_up)


def _resources_of(turn: Turn) -> Resources:
    return resources(turn.goal)


def _lacks_at(facts: Facts, ask: Ask, found: Interruption, needs: Mapping[str, Resources], start: float) -> Resources:
    """What lacks for all of them at once if it begins at `start`."""
    gone = frozenset({*needs, *(t.seen.vm.name for t in found.turns)})
    at = start + ask.back
    there = room(facts.capacity, facts.held, facts.reservations, gone, at)
    shifted = replace(facts, now=start)
    wanted = sum(needs.values(), Resources()) + _demanded(shifted, ask, at)
    return Resources(*(0 if getattr(there, n) >= UNLIMITED // 2 else getattr(wanted - there, n) for n in COUNTED))


def _later(facts: Facts, ask: Ask, found: Interruption, needs: Mapping[str, Resources]) -> float | None:
    """The first known end of a reservation after which the victims' return fits, the demand included."""
    ends = {r.ends_at for r in facts.reservations if r.ends_at is not None and r.state is not Held.ENDED}
    # A return that begins when the reservation in its way ends, and a start at that end.
    starts = sorted({e - ask.back for e in ends if e - ask.back > facts.now} | {e for e in ends if e > facts.now})
    for start in starts:
        if not _lacks_at(facts, ask, found, needs, start).any:
            return start
    return None


def _partly(
    needs: Mapping[str, Resources], turns: Sequence[Turn], lacks: Resources
) -> tuple[dict[str, Resources], tuple[str, ...]]:
    """What is held of each return when there is not enough: the highest priorities first."""
    wanted = sum(needs.values(), Resources())
    left_over = wanted - lacks
    held, given_up = {}, []
    for turn in sorted(turns, key=lambda t: (-t.seen.record.priority, t.seen.vm.name)):
        uuid = turn.seen.vm.uuid
        held[uuid] = needs[uuid].least(left_over)
        left_over -= held[uuid]
        if (short := needs[uuid] - held[uuid]).any:
            given_up.append(f"{in_words(short)} of the return of {turn.seen.vm.name} is not held")
    return held, tuple(given_up)
