"""Who is interrupted for a demand: never who may not be, nobody needlessly, the gentlest way that suffices, within
capacity at every moment, and with room to come back."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.decide.allocate import MIN_MEMORY
from hvctl.decide.interrupt import Ask, Facts, Interruption, plan_interruption
from hvctl.decide.reservations import room
from hvctl.decide.victims import Seen, Weights, cost_of, squeezed
from hvctl.model.allocation import Allocation, Record, Resources, resources
from hvctl.model.host import Capacity
from hvctl.model.plan import Refusal
from hvctl.model.pool import Held, Need, Reservation, Rung
from hvctl.model.vm import Balloon, State
from unit.vms import MIB, vm_with

MARGIN = 32 * MIB
HOUR = 3600.0


def seen(number: int, vcpus: int, memory: int, used: int, known: bool = False, **record: object) -> Seen:
    allocation = Allocation(vcpus, memory * MIB)
    vm = vm_with(allocation)
    made = Record(allocation, **record)  # type: ignore[arg-type]
    vm = replace(vm, uuid=f"u{number}", name=f"vm{number}", record=made, max_memory=8192 * MIB)
    balloon = Balloon(memory * MIB, memory * MIB, 0, max(0, memory - used) * MIB, 0.5)
    need = Need(resources(allocation), "promised") if not known else Need(Resources(50, used * MIB), "known", True)
    return Seen(vm, resources(allocation), need, balloon, age=600.0)


vms = st.lists(
    st.tuples(
        st.integers(1, 4), st.integers(2, 16).map(lambda n: n * 64), st.integers(16, 200), st.booleans(),
        st.integers(0, 1000), st.sampled_from((True, True, False)), st.sampled_from((False, False, False, True)),
    ),
    min_size=1,
    max_size=7,
)  # fmt: skip
rungs = st.sampled_from(
    ((Rung.SQUEEZE, Rung.PAUSE, Rung.SAVE), (Rung.SAVE,), (Rung.SQUEEZE,), (Rung.PAUSE,), tuple(Rung))
)
needs = st.builds(Resources, cpu=st.integers(0, 900), memory=st.integers(0, 3000).map(lambda n: n * MIB))


def facts_of(rows: list[tuple[int, int, int, bool, int, bool, bool]], spare: int) -> Facts:
    """A host that is full but for `spare` MiB and as many percent of a CPU."""
    all_seen = [
        seen(i, v, m, u, k, priority=p, interruptible=free, protected=kept)
        for i, (v, m, u, k, p, free, kept) in enumerate(rows)
    ]
    held = {s.vm.uuid: (s.vm.name, s.holds) for s in all_seen}
    full = sum((s.holds for s in all_seen), Resources())
    return Facts(Capacity(full.cpu + spare, full.memory + spare * MIB), held, (), all_seen, MARGIN, 1000.0)


@settings(max_examples=250, deadline=None)
@given(vms, needs, rungs, st.integers(0, 300), st.sampled_from((HOUR, 3 * HOUR, None)), st.booleans())
def test_a_plan_is_allowed_minimal_and_within_capacity(
    rows: list[tuple[int, int, int, bool, int, bool, bool]],
    need: Resources,
    allowed: tuple[Rung, ...],
    spare: int,
    lasts: float | None,
    by: bool,
) -> None:
    facts = facts_of(rows, spare)
    ask = Ask(need, "new", lasts, HOUR, facts.now if by else None, allowed)
    plan = plan_interruption(facts, ask)
    free = room(facts.capacity, facts.held, (), frozenset({"new"}), facts.now)
    lacking = need - free
    if isinstance(plan, Refusal):
        assert lacking.any
        assert plan.hint
        return
    for turn in plan.turns:
        vm = turn.seen.vm
        assert vm.record is not None
        assert vm.record.interruptible
        assert not vm.protected
        assert turn.rung in allowed
        assert turn.why
    given_back = sum((t.gives for t in plan.turns), Resources())
    assert not (lacking - given_back).any
    for one in plan.turns:
        rest = sum((t.gives for t in plan.turns if t is not one), Resources())
        assert (lacking - rest).any, f"{one.seen.vm.name} goes for nothing"
    assert {s.seen.vm.uuid for s in plan.shrinks}.isdisjoint(t.seen.vm.uuid for t in plan.turns)
    floors_hold(plan)
    stays_within(facts, ask, plan)


def floors_hold(plan: Interruption) -> None:
    for shrink in plan.shrinks:
        used = shrink.seen.balloon
        assert used is not None
        assert shrink.to.memory >= min(shrink.seen.record.allocation.memory, used.actual - (used.usable or 0) + MARGIN)
        assert not shrink.seen.vm.protected
        if shrink.seen.need.known:
            assert shrink.to.memory >= min(shrink.seen.holds.memory, shrink.seen.need.resources.memory)
    for turn in plan.turns:
        if turn.rung is Rung.SQUEEZE and turn.seen.balloon is not None:
            used = turn.seen.balloon
            floor = max(MIN_MEMORY, used.actual - (used.usable or 0) + MARGIN)
            assert turn.left.memory >= min(turn.seen.holds.memory, floor)


def stays_within(facts: Facts, ask: Ask, plan: Interruption) -> None:
    """Shrink before grow, in the order of the plan: the demand takes what is free after each step, and no more."""
    held = {u: r for u, (_, r) in facts.held.items()}
    most = Resources(facts.capacity.cpu, facts.capacity.memory)
    granted = Resources()

    def step() -> Resources:
        taken = sum(held.values(), Resources())
        assert not (taken - most).any
        return granted.largest((most - taken).least(ask.need))

    granted = step()
    for shrink in plan.shrinks:
        held[shrink.seen.vm.uuid] = resources(shrink.to)
        granted = step()
    for turn in plan.turns:
        held[turn.seen.vm.uuid] = turn.left
        granted = step()
    assert granted == ask.need
    # Everybody is back at once, and the demand is there still if it lasts.
    for uuid, size in plan.returns.items():
        held[uuid] = size
    lasting = ask.seconds is None or plan.at + ask.seconds > plan.at + ask.back
    assert not (sum(held.values(), granted if lasting else Resources()) - most).any
    whole = {t.seen.vm.uuid: resources(t.goal) for t in plan.turns}
    assert plan.given_up or dict(plan.returns) == whole
    assert not plan.given_up or ask.until is not None


@settings(max_examples=60, deadline=None)
@given(vms, needs, st.randoms(use_true_random=False))
def test_the_same_facts_have_the_same_answer_in_any_order(
    rows: list[tuple[int, int, int, bool, int, bool, bool]], need: Resources, chance: random.Random
) -> None:
    facts = facts_of(rows, 0)
    mixed = list(facts.seen)
    chance.shuffle(mixed)
    one, two = (plan_interruption(f, Ask(need, "new")) for f in (facts, replace(facts, seen=mixed)))
    assert isinstance(one, Refusal) == isinstance(two, Refusal)
    if isinstance(one, Interruption) and isinstance(two, Interruption):
        assert (one.turns, one.shrinks, one.at) == (two.turns, two.shrinks, two.at)


@given(st.integers(0, 2**40), st.none() | st.integers(0, 2**50), st.none() | st.floats(0, 100))
def test_no_claim_of_a_guest_leaves_it_with_nothing(actual: int, usable: int | None, age: float | None) -> None:
    one = replace(seen(0, 2, 512, 100), balloon=Balloon(actual, usable=usable, age=age))
    left = squeezed(one, MARGIN)
    assert MIN_MEMORY <= left.memory <= 512 * MIB
    if usable is None or age is None or age >= 30:
        assert left.memory == 512 * MIB, "who does not report gives nothing"


def test_the_gentlest_way_that_suffices() -> None:
    facts = facts_of([(4, 512, 100, False, 500, True, False)], 0)
    ways = tuple(Rung)
    for need, rung in (
        (Resources(cpu=300), Rung.SQUEEZE),
        (Resources(memory=300 * MIB), Rung.SQUEEZE),
        (Resources(cpu=400), Rung.PAUSE),
        (Resources(memory=500 * MIB), Rung.SAVE),
    ):
        plan = plan_interruption(facts, Ask(need, "new", HOUR, rungs=ways))
        assert isinstance(plan, Interruption)
        assert [t.rung for t in plan.turns] == [rung], need
    hurry = plan_interruption(facts, Ask(Resources(memory=500 * MIB), "new", HOUR, rungs=ways, within=1.0))
    assert isinstance(hurry, Interruption)
    assert [t.rung for t in hurry.turns] == [Rung.POWER_OFF], "there is no time for more"


def test_two_are_squeezed_before_one_is_saved() -> None:
    facts = facts_of([(1, 512, 250, False, 500, True, False), (1, 512, 250, False, 500, True, False)], 0)
    plan = plan_interruption(facts, Ask(Resources(memory=300 * MIB), "new", HOUR))
    assert isinstance(plan, Interruption)
    assert [t.rung for t in plan.turns] == [Rung.SQUEEZE] * 2


def test_only_what_lacks_is_squeezed() -> None:
    facts = facts_of([(4, 512, 100, False, 500, True, False)], 0)
    plan = plan_interruption(facts, Ask(Resources(memory=100 * MIB), "new", HOUR))
    assert isinstance(plan, Interruption)
    assert plan.turns[0].gives.cpu == 0


def test_without_a_balloon_memory_comes_only_from_its_end() -> None:
    facts = facts_of([(4, 512, 100, False, 500, True, False)], 0)
    (one,) = facts.seen
    bare = replace(facts, seen=[replace(one, vm=replace(one.vm, has_balloon=False), balloon=None)])
    plan = plan_interruption(bare, Ask(Resources(memory=100 * MIB), "new", HOUR))
    assert isinstance(plan, Interruption)
    assert plan.turns[0].rung is Rung.SAVE


def test_each_that_is_no_victim_says_why() -> None:
    facts = facts_of([(1, 512, 50, False, 500, True, True), (1, 512, 50, False, 500, False, False)], 0)
    paused = seen(2, 1, 512, 50, interruptible=True)
    mine, before, busy = (seen(n, 1, 512, 50, interruptible=True) for n in (3, 4, 5))
    more = [replace(paused, vm=replace(paused.vm, state=State.PAUSED)), mine, before, replace(busy, busy=True)]
    held = facts.held | {s.vm.uuid: (s.vm.name, s.holds) for s in more}
    full = sum((r for _, r in held.values()), Resources())
    whole = replace(facts, seen=[*facts.seen, *more], held=held, capacity=Capacity(full.cpu, full.memory))
    refusal = plan_interruption(whole, Ask(Resources(memory=9999 * MIB), "vm3", done=frozenset({"u4"})))
    assert isinstance(refusal, Refusal)
    for words in ("protected", "not interruptible", "is paused", "is who asks", "before"):
        assert words in refusal.message


def test_cheaper_is_lower_priority_quicker_back_less_lost_and_room_at_return() -> None:
    usual = Weights(500, 10.0, 600.0, 1.0)
    for dearer in (
        replace(usual, priority=501), replace(usual, restart=11.0), replace(usual, lost=700.0),
        replace(usual, available=0.9),
    ):  # fmt: skip
        assert cost_of(dearer) > cost_of(usual)
    assert cost_of(Weights(0, 0.0, 0.0, 1.0)) > 0


def kept(owner: str, memory: int, start: float, end: float | None) -> Reservation:
    size = Resources(memory=memory * MIB)
    return Reservation(1, owner, "", size, size, Held.HELD, start, end, None, start, 0.0, "me")


def test_who_could_not_come_back_waits_for_when_it_can() -> None:
    """The demand outlasts the return, and somebody else has the rest of the room until a known time."""
    facts = facts_of([(1, 512, 400, False, 500, True, False)], 0)
    crowded = replace(
        facts,
        reservations=[kept("other", 500, facts.now, facts.now + 2 * HOUR)],
        capacity=replace(facts.capacity, memory=(512 + 500 + 100) * MIB),
    )
    ask = Ask(Resources(memory=300 * MIB), "new", 4 * HOUR, HOUR, rungs=(Rung.SAVE,))
    plan = plan_interruption(crowded, ask)
    assert isinstance(plan, Interruption)
    assert plan.at == facts.now + HOUR, "it comes back when the other one goes"
    assert "200 MiB would lack" in plan.reasons[-1]
    hurried = plan_interruption(crowded, replace(ask, until=facts.now + HOUR / 2))
    assert isinstance(hurried, Interruption)
    assert hurried.at == facts.now
    assert hurried.given_up == ("memory 200 MiB of the return of vm0 is not held",)
    forever = replace(crowded, reservations=[kept("other", 500, facts.now, None)])
    refusal = plan_interruption(forever, ask)
    assert isinstance(refusal, Refusal)
    assert "could not come back" in refusal.message
    assert "--by" in (refusal.hint or "")


def test_neighbours_give_room_for_the_return() -> None:
    rows = [(1, 512, 400, False, 500, True, False), (1, 512, 100, False, 500, False, False)]
    facts = facts_of(rows, 0)
    ask = Ask(Resources(memory=200 * MIB), "new", None, HOUR, rungs=(Rung.SAVE,))
    plan = plan_interruption(facts, ask)
    assert isinstance(plan, Interruption)
    assert [(s.seen.vm.name, s.gives) for s in plan.shrinks] == [("vm1", Resources(memory=200 * MIB))]
    near = facts.seen[1]
    guarded = replace(near, vm=replace(near.vm, record=replace(near.record, protected=True)))
    # Who has an operation of its own now, and who gave of its own before and has not got it again.
    for alone in (guarded, replace(near, busy=True), replace(near, had=near.record)):
        assert isinstance(plan_interruption(replace(facts, seen=[facts.seen[0], alone]), ask), Refusal)
