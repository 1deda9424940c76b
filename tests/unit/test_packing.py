"""Covers of a need against the search of all subsets: the same cost, nothing needless, the same answer in any order."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.model.allocation import Resources
from hvctl.packing.choose import TOLERANCE, cheapest_cover
from hvctl.packing.cover import Candidate, Cover, covers

GIB = 1 << 30
amounts = st.builds(
    Resources, cpu=st.integers(0, 400), memory=st.integers(0, 8).map(lambda g: g * GIB), iops=st.integers(0, 3)
)
costs = st.floats(0.01, 1000.0) | st.sampled_from((1.0, 2.0))
fleets = st.lists(st.tuples(st.sampled_from("ab"), costs, amounts), max_size=9).map(
    lambda rows: [Candidate(f"vm{i}", host, cost, gives) for i, (host, cost, gives) in enumerate(rows)]
)


def by_hand(candidates: list[Candidate], lacking: dict[str, Resources]) -> float | None:
    """The least cost over every subset of every host."""
    found = [
        sum(c.cost for c in chosen)
        for host, need in lacking.items()
        for size in range(len(candidates) + 1)
        for chosen in itertools.combinations([c for c in candidates if c.host == host], size)
        if covers((c.gives for c in chosen), need)
    ]
    return min(found, default=None)


def assert_cover(cover: Cover, candidates: list[Candidate], lacking: dict[str, Resources]) -> None:
    members = {c.key: c for c in candidates if c.key in cover.keys}
    assert len(members) == len(cover.keys)
    assert {c.host for c in members.values()} <= {cover.host}
    assert covers((c.gives for c in members.values()), lacking[cover.host])
    for key in members:
        rest = [c.gives for k, c in members.items() if k != key]
        assert not covers(rest, lacking[cover.host]), "one of them is needless"


@settings(max_examples=150, deadline=None)
@given(fleets, amounts, amounts)
def test_small_cases_are_as_cheap_as_any_subset(fleet: list[Candidate], a: Resources, b: Resources) -> None:
    lacking = {"a": a, "b": b}
    best, cover = by_hand(fleet, lacking), cheapest_cover(fleet, lacking)
    assert (cover is None) == (best is None)
    if cover is not None and best is not None:
        assert cover.cost == pytest.approx(best, rel=1e-6)
        assert cover.bound <= cover.cost * (1 + 1e-9)
        assert cover.gap <= 1e-4
        assert_cover(cover, fleet, lacking)


@settings(max_examples=40, deadline=None)
@given(fleets, amounts, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(
    fleet: list[Candidate], need: Resources, chance: random.Random
) -> None:
    lacking = {"a": need, "b": need}
    shuffled = list(fleet)
    chance.shuffle(shuffled)
    assert cheapest_cover(shuffled, lacking) == cheapest_cover(fleet, lacking)


def large(seed: int, hosts: int = 40, each: int = 30) -> tuple[list[Candidate], dict[str, Resources]]:
    chance = random.Random(seed)
    sizes = (1, 2, 4, 8)
    fleet = [
        Candidate(
            f"vm{h}-{i}", f"h{h}", chance.lognormvariate(0, 1),
            Resources(100 * chance.choice(sizes), chance.choice(sizes) * GIB, 0, chance.choice((0, 100, 500))),
        )
        for h in range(hosts)
        for i in range(each)
    ]  # fmt: skip
    return fleet, {f"h{h}": Resources(chance.randint(300, 1500), chance.randint(4, 20) * GIB) for h in range(hosts)}


@pytest.mark.parametrize("seed", range(4))
def test_large_cases_are_within_the_tolerance_and_say_so(seed: int) -> None:
    fleet, lacking = large(seed)
    fast, exact = cheapest_cover(fleet, lacking), cheapest_cover(fleet, lacking, tolerance=0.0)
    assert fast is not None
    assert exact is not None
    assert exact.gap <= 1e-4
    assert exact.cost <= fast.cost * (1 + 1e-9) <= exact.cost * (1 + TOLERANCE) * (1 + 1e-9)
    assert fast.gap <= TOLERANCE + 1e-9
    assert fast.bound <= exact.cost * (1 + 1e-9)
    assert_cover(fast, fleet, lacking)


def test_what_lacks_a_byte_is_no_cover() -> None:
    """A solver in floating point takes the cheap one for enough."""
    fleet = [
        Candidate("short", "a", 1.0, Resources(memory=4 * GIB - 1)),
        Candidate("whole", "a", 5.0, Resources(memory=4 * GIB)),
    ]
    cover = cheapest_cover(fleet, {"a": Resources(memory=4 * GIB)})
    assert cover is not None
    assert cover.keys == ("whole",)


def test_where_nothing_lacks_nobody_is_chosen() -> None:
    fleet = [Candidate("vm", "a", 1.0, Resources(cpu=100))]
    assert cheapest_cover(fleet, {"a": Resources()}) == Cover("a", (), 0.0, 0.0)
    assert cheapest_cover([], {"a": Resources(cpu=1)}) is None
    assert cheapest_cover(fleet, {"a": Resources(cpu=101)}) is None
