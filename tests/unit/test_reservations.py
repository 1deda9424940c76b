"""What reservations hold, for whom, and when: nobody but the owner gets it, what decays never comes back, and the table
of the pool says what admission does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.decide.admission import admit
from hvctl.decide.pool import lines
from hvctl.decide.reservations import FOREVER, hit_rates, in_force, room, settled
from hvctl.model.allocation import Resources
from hvctl.model.host import Capacity, HostFacts, Ledger
from hvctl.model.pool import Held, Reservation
from hvctl.settings import Settings

CAPACITY = Capacity(cpu=400, memory=1000)
HELD = {"u1": ("a", Resources(100, 300)), "u2": ("b", Resources(100, 200))}
HOUR = 3600.0


def reservation(owner: str, memory: int, start: float = 0.0, end: float | None = None, **more: object) -> Reservation:
    size = Resources(memory=memory)
    made = Reservation(1, owner, "", size, size, Held.HELD, start, end, None, start, 0.0, "me")
    return replace(made, **more)  # type: ignore[arg-type]


def asked(memory: int, uuid: str, kept: list[Reservation], now: float = 0.0, name: str = "new") -> bool:
    return admit(CAPACITY, HELD, uuid, Resources(memory=memory), kept, name, now) is None


def test_what_is_reserved_is_there_for_its_owner_alone() -> None:
    kept = [reservation("ci-9", 400)]
    assert asked(100, "u9", kept, name="other")
    assert not asked(101, "u9", kept, name="other")
    assert asked(500, "u9", kept, name="ci-9")
    assert not asked(501, "u9", kept, name="ci-9")
    assert asked(400, "ci-9", kept, name="")


def test_an_owner_that_runs_does_not_hold_twice() -> None:
    """a is promised 300, and has 500 reserved: together 500."""
    kept = [reservation("a", 500)]
    assert asked(300, "u9", kept)
    assert not asked(301, "u9", kept)
    assert asked(500, "u1", kept, name="a")
    assert asked(300, "u9", [reservation("u1", 500)]), "by uuid as by name"


def test_who_comes_to_stay_may_not_sit_where_somebody_comes_later() -> None:
    kept = [reservation("late", 400, start=HOUR, end=2 * HOUR)]
    assert not asked(200, "u9", kept)
    assert asked(200, "u9", kept, now=2 * HOUR)
    own = [reservation("new", 450, end=HOUR), *kept]
    assert asked(450, "u9", own), "inside its own reservation, which ends before"
    assert not asked(450, "u9", [reservation("new", 450, end=HOUR + 1), *kept])


def test_a_refusal_says_what_reservations_hold() -> None:
    refusal = admit(CAPACITY, HELD, "u9", Resources(memory=501), [reservation("ci-9", 400)], "x", 0.0)
    assert refusal is not None
    assert "reservations 400 B" in (refusal.hint or "")


def test_what_is_not_used_decays_and_does_not_come_back() -> None:
    one = reservation("a", 400, half_life=60.0)
    assert [in_force(one, t).memory for t in (0, 60, 120)] == [400, 200, 100]
    looked = settled(one, Resources(memory=100), 60.0)
    assert looked.granted.memory == 200
    assert in_force(looked, 60.0).memory == 200
    assert in_force(looked, 120.0).memory == 150, "what is used stays"
    assert settled(looked, Resources(memory=400), 61.0).granted.memory <= 200
    assert in_force(settled(one, Resources(memory=400), 0.0), 10 * HOUR).memory == 400, "all of it is used"


def test_hits_and_waste_are_added_up_over_time() -> None:
    one = reservation("a", 400)
    for at, used in ((10.0, 100), (20.0, 400), (40.0, 0)):
        one = settled(one, Resources(memory=used), at)
    assert one.reserved_seconds["memory"] == 400 * 40
    assert hit_rates(one)["memory"] == pytest.approx((100 * 10 + 400 * 10) / (400 * 40))
    later = reservation("a", 400, start=100.0)
    assert settled(later, Resources(), 50.0).reserved_seconds == {}
    assert settled(settled(later, Resources(), 50.0), Resources(), 110.0).reserved_seconds["memory"] == 400 * 10


owners = st.sampled_from(("a", "u2", "new", "x", "y"))
times = st.sampled_from((0.0, 10.0, 50.0, 100.0))
made = st.builds(
    reservation,
    owner=owners,
    memory=st.integers(0, 500),
    start=times,
    end=st.none() | st.sampled_from((20.0, 60.0, 200.0)),
    half_life=st.none() | st.just(30.0),
)


@settings(max_examples=300)
@given(st.lists(made, max_size=5), st.integers(0, 1000), st.sampled_from(("a", "new", "other")))
def test_what_is_granted_for_ever_fits_at_every_later_moment(kept: list[Reservation], want: int, name: str) -> None:
    """Against sums at every moment; for an owner only what goes beyond its own reservation."""
    uuid = {"a": "u1"}.get(name, "u9")
    own = frozenset({uuid, name})
    if not asked(want, uuid, kept, name=name) or want <= HELD.get(uuid, ("", Resources()))[1].memory:
        return
    mine = [r for r in kept if r.owner in own]
    inside = sum(in_force(r, 0.0).memory for r in mine)
    ends = [FOREVER if r.ends_at is None else r.ends_at for r in mine if in_force(r, 0.0).memory]
    until = max(ends, default=0.0) if want <= inside else FOREVER
    promised = {n: r.memory for n, r in HELD.values() if n != name}
    for at in (t for t in (0.0, 5.0, 10.0, 30.0, 50.0, 100.0, 150.0, 10**6) if t < until):
        taken = dict(promised)
        for one in (r for r in kept if r.owner not in own):
            owner = {"u2": "b", "u1": "a"}.get(one.owner, one.owner)
            taken[f"r {owner}"] = taken.get(f"r {owner}", 0) + in_force(one, at).memory
        whole = sum(max(taken.get(n, 0), taken.get(f"r {n}", 0)) for n in {k.removeprefix("r ") for k in taken})
        assert whole + want <= 1000


@settings(max_examples=200)
@given(st.lists(made, max_size=5))
def test_free_in_the_table_is_what_a_newcomer_gets(kept: list[Reservation]) -> None:
    facts = HostFacts("h", "fake://", 4, 1000, "", "", "", 2, 0, 0)
    plain = Settings(cpu_overcommit=1.0, reserve_memory=0)
    table = {x.resource: x for x in lines(facts, plain, HELD, Ledger((), tuple(kept)), {}, None, 0.0)}
    free = table["memory"].free
    assert free is not None
    assert admit(CAPACITY, HELD, "u9", Resources(memory=free), kept, "newcomer", 0.0) is None
    assert admit(CAPACITY, HELD, "u9", Resources(memory=free + 1), kept, "newcomer", 0.0) is not None
    assert room(CAPACITY, HELD, kept, frozenset({"newcomer"}), 0.0).memory == free
    assert table["memory"].allocated == 500
    assert table["network"].free is None
