"""What guards remember and what they decided, in both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvctl.adapters.store.store import Store
from hvctl.errors import NotFoundError
from hvctl.model.guard import (
    Act,
    Allowed,
    Alternative,
    Decided,
    GuardDecision,
    GuardFacts,
    GuardMemory,
    GuardPolicy,
    GuardState,
    Measure,
    Outlook,
    Verdict,
    Watch,
)
from tests.contract.stores import database_url, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

WATCH = Watch("w", GuardPolicy("w", (Allowed("cache"),)))
FACTS = GuardFacts("a", 1.0, (Measure("cpu", "cores", ((1.0, 0.5), (2.0, 0.6)), 1.0, after={"whole": 0.1}),))
OUTLOOK = Outlook("cpu", "cores", 0.6, 1.0, 0.1, 4.0, 0.5, 7.0, "trend")
CACHE = Alternative("cache", Act.CACHE, ("cpu",), 9.0, 1.0, "why")


def decided(at: float, vm: str = "u", chosen: Alternative | None = None, **more: object) -> Decided:
    verdict = Verdict.QUIET if chosen is None else Verdict.ACTS
    decision = GuardDecision(verdict, chosen, "why", (OUTLOOK,), (CACHE,), GuardMemory({}, None, None))
    return Decided(vm, "a", at, at, WATCH, FACTS, GuardMemory(), decision, most=7.0, most_at=at, **more)  # type: ignore[arg-type]


def test_what_is_remembered_is_as_it_was_and_can_be_forgotten(store: Store) -> None:
    state = GuardState(GuardMemory({"cpu": 2}, 5.0, "cache"), {"disk:a": ((1.0, 2.0),)})
    store.guards.remember("h", "u", state)
    assert store.guards.state("h", "u") == state
    assert store.guards.state("other", "u") == GuardState()
    store.guards.remember("h", "u", None)
    assert store.guards.state("h", "u") == GuardState()


def test_the_same_nothing_is_one_row_and_an_action_its_own(store: Store) -> None:
    first = store.guards.decided("h", decided(10.0), GuardState())
    longer = store.guards.decided("h", replace(decided(20.0), most=9.0), GuardState())
    assert (longer.id, longer.at, longer.until, longer.looks) == (first.id, 10.0, 20.0, 2)
    assert (longer.most, longer.most_at) == (9.0, 20.0)
    calm = store.guards.decided("h", replace(decided(30.0), most=1.0), GuardState())
    assert (calm.looks, calm.most, calm.most_at) == (3, 9.0, 20.0)
    assert store.guards.decided("h", decided(30.0, "other"), GuardState()).looks == 1
    acts = store.guards.decided("h", decided(40.0, chosen=CACHE), GuardState())
    again = store.guards.decided("h", decided(45.0, chosen=CACHE), GuardState())
    after = store.guards.decided("h", decided(50.0), GuardState())
    assert [d.id for d in store.guards.of_vm("h", "u")] == [after.id, again.id, acts.id, first.id]
    other_policy = replace(decided(60.0), watch=replace(WATCH, name="v"))
    assert store.guards.decided("h", other_policy, GuardState()).looks == 1
    late = replace(other_policy, at=60.0 + 3600.0, until=60.0 + 3600.0)
    assert store.guards.decided("h", late, GuardState()).looks == 1
    assert {u: d.looks for u, d in store.guards.newest("h").items()} == {"u": 1, "other": 1}


def test_what_came_of_an_action_is_found_by_its_operation(store: Store) -> None:
    made = store.guards.decided("h", decided(10.0, chosen=CACHE, kept_until=99.0), GuardState())
    assert [d.id for d in store.guards.pending("h")] == [made.id]
    done = replace(made, outcome="done", operation=7)
    store.guards.change("h", done)
    assert store.guards.pending("h") == []
    assert store.guards.of_operation(7) == store.guards.decision(made.id) == done
    assert store.guards.of_operation(8) is None
    assert [d.kept for d in store.guards.kept("h")] == [f"guard-{made.id}"]
    with pytest.raises(NotFoundError, match="d99"):
        store.guards.decision(99)


def test_only_what_is_over_is_removed(store: Store) -> None:
    store.guards.decided("h", decided(10.0, "old"), GuardState())
    store.guards.decided("h", decided(10.0, "pending", chosen=CACHE), GuardState())
    store.guards.decided("h", decided(10.0, "kept", chosen=CACHE, kept_until=99.0, outcome="done"), GuardState())
    store.guards.decided("h", decided(60.0, "new"), GuardState(GuardMemory({"cpu": 1})))
    store.guards.remember("h", "old", GuardState(GuardMemory({"cpu": 1})))
    assert store.guards.prune("h", 50.0) == 1
    assert set(store.guards.newest("h")) == {"pending", "kept", "new"}
    assert store.guards.state("h", "old") == GuardState()
    assert store.guards.state("h", "new").memory.pressed == {"cpu": 1}
