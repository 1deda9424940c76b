"""What a guard decides, as properties of every situation: never more than its policy allows, and one thing at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl import codec
from hvctl.decide.allocate import promised_after
from hvctl.decide.exhaustion import outlook
from hvctl.decide.growth import growth
from hvctl.decide.guard import DEFAULT_TAKE, decide
from hvctl.decide.guardmeasures import cpu, memory
from hvctl.decide.guardpolicy import problem
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.guard import (
    Act,
    Allowed,
    Cost,
    GuardDecision,
    GuardFacts,
    GuardMemory,
    GuardPolicy,
    Measure,
    Points,
    Verdict,
)
from unit.vms import MAX_VCPUS, vm_with

NOW = 10_000.0
PARTS = ("grow", "cache", "net", "disk:scratch", "ram:0x1000-0x2000", "whole")
RESOURCES = ("memory", "resident", "cpu", "disk:scratch", "connections")


def rising(rate: float, start: float = 0.0, every: float = 10.0, count: int = 12) -> Points:
    """Up to now, in a straight line."""
    return tuple((NOW - every * (count - 1 - i), start + rate * every * i) for i in range(count))


def policy(*parts: str, **more: object) -> GuardPolicy:
    wanted = {"to": "clean", "looks": 1} | more
    return GuardPolicy("of a test", tuple(Allowed(p, 0.0) for p in parts), **wanted)  # type: ignore[arg-type]


values = st.floats(0, 200, allow_nan=False)
points = st.lists(st.tuples(st.floats(NOW - 900, NOW), values), max_size=8).map(lambda p: tuple(sorted(p)))
measures = st.builds(
    Measure,
    st.sampled_from(RESOURCES),
    st.just("units"),
    points,
    st.floats(1, 150),
    points,
    st.none() | st.floats(1, 400),
    st.lists(st.tuples(st.sampled_from((0.5, 0.95)), values), max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(PARTS), values, max_size=4),
)
facts = st.builds(
    GuardFacts,
    st.just("a"),
    st.just(NOW),
    st.lists(measures, max_size=4, unique_by=lambda m: m.resource).map(tuple),
    st.dictionaries(
        st.sampled_from(PARTS),
        st.builds(Cost, st.floats(0, 100), st.integers(0, 3), st.floats(0, 900), st.none() | st.floats(0, 100)),
    ),
    st.dictionaries(st.sampled_from(PARTS), st.just("it cannot be done"), max_size=2),
)
policies = st.builds(
    GuardPolicy,
    st.just("any"),
    st.lists(
        st.builds(Allowed, st.sampled_from(PARTS), st.floats(0, 1)), min_size=1, max_size=5, unique_by=lambda a: a.part
    ).map(tuple),
    st.just("clean"),
    threshold=st.floats(0, 400),
    release=st.floats(0.1, 1),
    looks=st.integers(1, 3),
    cool_down=st.floats(1, 1000),
)
memories = st.builds(
    GuardMemory,
    st.dictionaries(st.sampled_from(RESOURCES), st.integers(1, 3), max_size=3),
    st.none() | st.floats(NOW - 1200, NOW),
    st.just("cache"),
)


@given(facts, policies, memories)
def test_never_a_part_that_is_not_allowed_or_cannot_be_done(f: GuardFacts, p: GuardPolicy, m: GuardMemory) -> None:
    made = decide(f, p, m)
    assert {a.part for a in made.alternatives} <= {a.part for a in p.allow}
    if made.chosen is not None:
        assert made.chosen.part not in f.refused
        assert made.chosen in made.alternatives


@given(facts, policies, memories)
def test_nothing_below_the_threshold_or_while_it_cools_down(f: GuardFacts, p: GuardPolicy, m: GuardMemory) -> None:
    made = decide(f, p, m)
    assert (made.chosen is not None) == (made.verdict is Verdict.ACTS)
    if made.chosen is not None:
        assert made.chosen.score >= p.threshold
        assert m.acted_at is None or NOW - m.acted_at >= p.cool_down
        assert made.memory.acted_at == NOW
        again = decide(f, p, made.memory)
        assert again.chosen is None, "at most one action at a time"


@given(facts, policies, memories)
def test_what_the_journal_keeps_is_decided_the_same_again(f: GuardFacts, p: GuardPolicy, m: GuardMemory) -> None:
    made = decide(f, p, m)
    kept = [codec.load(kind, codec.dump(v)) for kind, v in ((GuardFacts, f), (GuardPolicy, p), (GuardMemory, m))]
    assert decide(*kept) == made  # type: ignore[arg-type]
    assert codec.load(GuardDecision, codec.dump(made)) == made


@given(measures, st.floats(30, 3600))
def test_the_guests_word_only_makes_it_look_less_pressed(measure: Measure, horizon: float) -> None:
    silent = outlook(replace(measure, claimed=()), NOW, horizon, 1000.0, None)
    told = outlook(measure, NOW, horizon, 1000.0, None)
    assert (silent is None) == (told is None), "without the host's own measure the guest is not believed"
    if silent is not None and told is not None:
        assert told.contention <= silent.contention


@given(facts, policies, memories)
def test_whoever_is_told_more_by_the_guest_acts_no_sooner(f: GuardFacts, p: GuardPolicy, m: GuardMemory) -> None:
    silent = replace(f, measures=tuple(replace(x, claimed=()) for x in f.measures))
    if decide(silent, p, m).verdict in (Verdict.QUIET, Verdict.UNSEEN):
        assert decide(f, p, m).chosen is None


def test_a_leak_is_answered_before_it_is_at_the_limit() -> None:
    leak = Measure("resident", "bytes", rising(1.0), 300.0, after={"cache": 10.0})
    seen = outlook(leak, NOW, 600.0, 600.0, None)
    assert seen is not None
    assert (seen.level, seen.eta, seen.probability) == (110.0, pytest.approx(190.0), 1.0)
    assert seen.contention == pytest.approx(410.0)
    made = decide(GuardFacts("a", NOW, (leak,)), policy("cache", threshold=60.0, horizon=600.0), GuardMemory())
    assert made.chosen is not None
    assert made.chosen.part == "cache"
    assert made.chosen.benefit == pytest.approx(100.0), "a hundred units fewer are a hundred seconds later"


def test_it_cools_down_to_the_very_second() -> None:
    leak = Measure("resident", "bytes", rising(1.0), 300.0, after={"cache": 10.0})
    rules = policy("cache", threshold=60.0, horizon=600.0, cool_down=80.0)

    def after(seconds: float) -> Verdict:
        return decide(GuardFacts("a", NOW, (leak,)), rules, GuardMemory({}, NOW - seconds, "cache")).verdict

    assert [after(79.0), after(80.0)] == [Verdict.COOLING, Verdict.ACTS]


def test_what_nobody_has_measured_lately_is_not_known() -> None:
    leak = Measure("resident", "bytes", rising(1.0), 300.0, after={"cache": 10.0})
    rules = policy("cache", threshold=1.0, horizon=600.0, window=100.0)
    assert decide(GuardFacts("a", NOW + 50.0, (leak,)), rules, GuardMemory()).verdict is Verdict.ACTS
    assert decide(GuardFacts("a", NOW + 51.0, (leak,)), rules, GuardMemory()).verdict is Verdict.UNSEEN


def test_what_cannot_be_done_is_not_chosen_however_much_it_would_help() -> None:
    leak = Measure("resident", "bytes", rising(1.0), 300.0, after={"cache": 10.0})
    facts = GuardFacts("a", NOW, (leak,), refused={"cache": "there is no agent"})
    made = decide(facts, policy("cache", threshold=60.0, horizon=600.0), GuardMemory())
    assert (made.verdict, made.alternatives[0].refused) == (Verdict.UNABLE, "there is no agent")


def test_a_flat_line_and_a_falling_one_never_run_out() -> None:
    for line in (rising(0.0, 290.0), rising(-1.0, 250.0)):
        made = decide(GuardFacts("a", NOW, (Measure("cpu", "cores", line, 300.0),)), policy("grow"), GuardMemory())
        assert made.verdict is Verdict.QUIET


def test_two_points_are_no_trend_but_a_limit_that_is_reached_is_seen() -> None:
    two = Measure("cpu", "cores", ((NOW - 10, 1.0), (NOW, 90.0)), 100.0, most=400.0)
    assert decide(GuardFacts("a", NOW, (two,)), policy("grow"), GuardMemory()).verdict is Verdict.QUIET
    full = replace(two, limit=90.0)
    made = decide(GuardFacts("a", NOW, (full,)), policy("grow"), GuardMemory())
    assert made.chosen is not None
    assert made.chosen.limit == 90.0 * 1.25


def test_a_forecast_is_believed_where_the_trend_says_less() -> None:
    flat = Measure("cpu", "cores", rising(0.0, 50.0), 100.0, most=400.0, quantiles=((0.95, 300.0),))
    seen = outlook(flat, NOW, 1800.0, 600.0, None)
    assert seen is not None
    assert (seen.by, seen.eta) == ("forecast", None)
    assert 0.7 < seen.probability < 1.0
    beyond = outlook(replace(flat, quantiles=((0.95, 90.0),)), NOW, 1800.0, 600.0, None)
    assert beyond is not None
    assert beyond.probability < 0.05


def test_it_is_looked_at_again_before_anything_is_done_and_no_jitter_starts_it_anew() -> None:
    rules = policy("cache", threshold=100.0, release=0.5, looks=3, horizon=600.0)

    def at(contention: float, memory: GuardMemory) -> GuardDecision:
        # In a straight line towards a limit that it reaches so many seconds before the end of the horizon.
        leak = Measure("resident", "bytes", rising(1.0), 110.0 + 600.0 - contention, after={"cache": 0.0})
        return decide(GuardFacts("a", NOW, (leak,)), rules, memory)

    first = at(120.0, GuardMemory())
    assert (first.verdict, first.memory.pressed) == (Verdict.FIRST_LOOK, {"resident": 1})
    dip = at(60.0, first.memory)
    assert dip.memory.pressed == {"resident": 2}, "below the threshold, but not below the release"
    assert at(60.0, GuardMemory()).verdict is Verdict.QUIET, "what was not pressed yet is not by so little"
    assert at(40.0, dip.memory).memory.pressed == {}
    third = at(150.0, dip.memory)
    assert third.verdict is Verdict.ACTS


def test_what_is_cheap_goes_first_and_work_that_is_lost_counts() -> None:
    full = Measure("disk:scratch", "bytes", rising(1.0), 150.0, after={"disk:scratch": 0.0, "whole": 0.0})
    lost = {"disk:scratch": Cost(1.0, 3, 50.0), "whole": Cost(0.1, 3, 50.0)}
    rules = replace(policy(horizon=600.0), allow=(Allowed("whole", 1.0), Allowed("disk:scratch", 0.0)))
    made = decide(GuardFacts("a", NOW, (full,), lost), rules, GuardMemory())
    assert made.chosen is not None
    assert (made.chosen.part, made.chosen.cost) == ("disk:scratch", 1.0)
    dear = decide(GuardFacts("a", NOW, (full,), lost, {"disk:scratch": "in use"}), rules, GuardMemory())
    assert dear.verdict is Verdict.NOT_WORTH


def test_what_is_kept_before_costs_its_pause_as_earlier_ones_took() -> None:
    full = Measure("disk:scratch", "bytes", rising(1.0), 150.0, after={"disk:scratch": 0.0, "net": 10.0})
    allow = (Allowed("disk:scratch", 0.0), Allowed("net"))

    def costs(snapshot_first: bool, cost: Cost | None) -> list[tuple[float, str]]:
        rules = replace(policy(horizon=600.0), allow=allow, snapshot_first=snapshot_first)
        known = {} if cost is None else {a.part: cost for a in allow}
        made = decide(GuardFacts("a", NOW, (full,), known), rules, GuardMemory())
        return [(a.cost, a.why) for part in ("disk:scratch", "net") for a in made.alternatives if a.part == part]

    taken = Cost(1.0, 3, 0.0, 0.25, 2)
    (disk, why), (net, plain) = costs(True, taken)
    assert (disk, net) == (1.25, 1.0), "what goes back to no snapshot keeps none"
    assert "pause for a snapshot first 0.25 s (median of 2 on this VM)" in why
    assert "snapshot" not in plain
    assert [c for c, _ in costs(False, taken)] == [1.0, 1.0]
    assert costs(True, Cost(1.0, 3))[0][0] == 1.0 + DEFAULT_TAKE
    assert "default: none was taken of this VM" in costs(True, None)[0][1]


def test_an_action_that_is_only_worth_it_when_nothing_is_kept_before_is_left() -> None:
    full = Measure("disk:scratch", "bytes", rising(1.0), 150.0, after={"disk:scratch": 0.0})
    rules = replace(policy(horizon=600.0), allow=(Allowed("disk:scratch", 0.0),))
    benefit = decide(GuardFacts("a", NOW, (full,)), rules, GuardMemory()).alternatives[0].benefit
    facts = GuardFacts("a", NOW, (full,), {"disk:scratch": Cost(1.0, 3, 0.0, benefit, 1)})
    assert decide(facts, rules, GuardMemory()).verdict is Verdict.ACTS
    assert decide(facts, replace(rules, snapshot_first=True), GuardMemory()).verdict is Verdict.NOT_WORTH


def test_what_was_measured_before_an_action_tells_nothing_after_it() -> None:
    leak = Measure("resident", "bytes", (*rising(1.0), (NOW + 20, 5.0), (NOW + 30, 6.0)), 120.0, after={"cache": 0.0})
    rules = policy("cache", cool_down=10.0, horizon=600.0, threshold=1.0)
    made = decide(GuardFacts("a", NOW + 30, (leak,)), rules, GuardMemory({}, NOW + 10, "cache"))
    assert made.verdict is Verdict.QUIET
    assert [o.rate for o in made.outlooks] == [None]


def test_a_clock_that_was_set_back_stops_nobody_for_long() -> None:
    leak = Measure("resident", "bytes", rising(1.0), 300.0, after={"cache": 10.0})
    ahead = GuardMemory({}, NOW + 86400.0, "cache")
    made = decide(GuardFacts("a", NOW, (leak,)), policy("cache", threshold=60.0, horizon=600.0), ahead)
    assert made.verdict is Verdict.ACTS


def test_what_only_the_operator_knows_is_said_in_the_policy() -> None:
    busy = Measure("cpu", "cores", rising(0.001, 0.9), 0.95)
    blind = decide(GuardFacts("a", NOW, (busy,)), policy("ram:0x1000-0x2000"), GuardMemory())
    assert blind.verdict is Verdict.UNABLE
    said = replace(policy(), allow=(Allowed("ram:0x1000-0x2000", 0.0, ("cpu",), 0.5),))
    made = decide(GuardFacts("a", NOW, (busy,)), said, GuardMemory())
    assert made.chosen is not None
    assert made.chosen.resources == ("cpu",)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"allow": ()}, "allows nothing"),
        ({"allow": (Allowed("cache"), Allowed("cache"))}, "twice"),
        ({"allow": (Allowed("disks"),)}, "disks"),
        ({"allow": (Allowed("ram"),)}, "'ram'"),
        ({"allow": (Allowed("disk:a,disk:b"),)}, "disk:a"),
        ({"allow": (Allowed("disk:a"),), "to": None}, "snapshot"),
        ({"allow": (Allowed("cache", float("nan")),)}, "worth"),
        ({"allow": (Allowed("cache", relief=0.5),)}, "relief"),
        ({"allow": (Allowed("cache", before=(("umount",),)),)}, "hooks"),
        ({"allow": (Allowed("disk:a", before=((),)),)}, "hook"),
        ({"threshold": float("nan")}, "threshold"),
        ({"horizon": 0.0}, "horizon"),
        ({"release": 0.0}, "release"),
        ({"grow_by": float("inf")}, "grow_by"),
        ({"looks": 0}, "looks"),
        ({"resident": -1}, "resident"),
    ],
)
def test_a_policy_that_makes_no_sense_is_found(change: dict[str, object], word: str) -> None:
    assert problem(policy("cache")) is None
    found = problem(replace(policy("cache"), **change))  # type: ignore[arg-type]
    assert found is not None
    assert word in found


def test_every_act_has_its_default_cost_and_the_gentlest_comes_first() -> None:
    from hvctl.decide.guard import DEFAULT_COSTS

    assert list(DEFAULT_COSTS) == list(Act)


@given(
    st.sampled_from(("cpu", "memory")),
    st.none() | st.integers(10, 400),
    st.integers(64 << 10, 4096 << 10),
    st.builds(Resources, st.integers(0, 1000), st.integers(0, 8 << 30)),
    st.floats(0.01, 10),
)
def test_what_it_lets_grow_is_never_more_than_the_room_down_to_the_byte(
    resource: str, quota: int | None, kib: int, room: Resources, by: float
) -> None:
    has = Allocation(MAX_VCPUS // 2, kib << 10, quota)
    vm, held = replace(vm_with(has), max_memory=4 << 30), resources(has)
    room = room.largest(held)
    used = ((NOW - 1.0, 1e12),)
    measure = cpu(vm, used, room, ()) if resource == "cpu" else memory(vm, used, (), room, 32 << 20, ())
    seen = GuardFacts("a", NOW, (measure,), refused={})
    (answer,) = decide(seen, policy("grow", grow_by=by), GuardMemory()).alternatives
    if answer.refused is None:
        assert answer.limit is not None
        new = promised_after(vm, growth(vm, resource, answer.limit, 32 << 20))
        assert isinstance(new, Allocation)
        assert not (resources(new) - room).any
        assert (resources(new) - held).any
