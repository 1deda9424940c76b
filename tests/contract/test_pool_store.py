"""Reservations and hand-overs on both databases: decided under the host's lock, and moved in one transaction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvctl.adapters.store.poolstore import PoolMove
from hvctl.adapters.store.store import Store
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.allocation import Allocation, Record, Resources
from hvctl.model.host import Ledger, Promise
from hvctl.model.operation import Kind, OpState
from hvctl.model.pool import Away, Errand, Held, Limits, Reservation, Rung
from tests.contract.stores import HOST, at_once, begin, database_url, memory_held, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

CAPACITY = 10
RECORD = Record(Allocation(1, 6), interruptible=True)


def reservation(owner: str, memory: int, state: Held = Held.HELD, **more: object) -> Reservation:
    size = Resources(memory=memory)
    made = Reservation(0, owner, "why", size, size, state, 0.0, None, 60.0, 0.0, 0.0, "me")
    return replace(made, **more)  # type: ignore[arg-type]


def free(ledger: Ledger) -> int:
    return CAPACITY - memory_held(ledger) - sum(r.granted.memory for r in ledger.reservations)


def whole(ledger: Ledger, one: Reservation) -> Resources:
    if one.size.memory > free(ledger):
        raise RefusedError("memory lacks.")
    return one.size


def partly(ledger: Ledger, one: Reservation) -> Resources:
    return Resources(memory=max(0, min(one.size.memory, free(ledger))))


def test_what_is_written_is_read(store: Store) -> None:
    errand = Errand(3600.0, 30.0, (Rung.SAVE,), (("u1", Rung.SAVE),))
    demand, returns = store.pool.reserve(
        HOST, (reservation("x", 3, errand=errand), reservation("u1", 2)), whole, key="k"
    )
    assert store.pool.reservations(HOST) == (demand, returns)
    assert store.pool.reservation(demand.id) == demand
    assert (demand.errand, demand.key, returns.demand, returns.key) == (errand, "k", demand.id, None)
    assert store.pool.reserve(HOST, (reservation("y", 9),), whole, key="k") == (demand,)
    ended = store.pool.change(HOST, demand.id, lambda one, _: replace(one, state=Held.ENDED, closed_at=5.0))
    assert store.pool.reservations(HOST) == (returns,)
    assert store.pool.reservations(HOST, ended=True) == (ended, returns)
    assert store.pool.reservations("elsewhere") == ()
    for missing in (lambda: store.pool.reservation(99), lambda: store.pool.change(HOST, 99, lambda one, _: one)):
        with pytest.raises(NotFoundError):
            missing()
    assert store.pool.limits(HOST) == Limits()
    store.pool.set_limits(HOST, Limits(cpu_overcommit=2.5, iops_capacity=100))
    assert store.pool.limits(HOST) == Limits(cpu_overcommit=2.5, iops_capacity=100)


def test_all_or_none(store: Store) -> None:
    with pytest.raises(RefusedError):
        store.pool.reserve(HOST, (reservation("x", 6), reservation("y", 6)), whole)
    assert store.pool.reservations(HOST) == ()


def test_many_at_once_get_what_there_is(url: str, store: Store) -> None:
    def ask(number: int) -> str:
        with Store(url) as mine:
            try:
                mine.pool.reserve(HOST, (reservation(f"r{number}", 3),), whole)
            except RefusedError:
                return "refused"
            return "granted"

    answers = at_once(12, ask)
    assert sorted(answers) == ["granted"] * 3 + ["refused"] * 9


def test_the_end_of_an_interruption_moves_its_room(store: Store) -> None:
    """In one transaction: nobody sees it free in between, and a transaction that fails moves nothing."""
    before = begin(store, "web", kind=Kind.START)
    promise = Promise("uuid-web", "web", Resources(memory=6), holds=True)
    store.close_operation(before.id, OpState.DONE, promise=promise, record=RECORD)
    (demand,) = store.pool.reserve(HOST, (reservation("x", 8, Held.WAITING),), partly)
    assert demand.granted.memory == 4
    operation = begin(store, "web", kind=Kind.INTERRUPT)
    away = Away("uuid-web", "web", Rung.SAVE, RECORD, RECORD.allocation, RECORD, 1.0, 2.0, "", "", demand=demand.id)

    def fails(ledger: Ledger, one: Reservation) -> Resources:
        raise HvctlError("died here")

    off = replace(promise, holds=False)
    with pytest.raises(HvctlError, match="died here"):
        store.close_operation(operation.id, OpState.DONE, promise=off, record=RECORD, move=PoolMove(away, fails))
    assert store.operation(operation.id).state is OpState.OPEN
    assert (store.pool.away(HOST), store.pool.reservation(demand.id)) == ((), demand)
    assert store.promise_of(HOST, "uuid-web") == promise

    for _ in range(2):
        move = PoolMove(away, lambda ledger, one: partly(ledger, replace(one, size=Resources(memory=99))), at=1.0)
        store.close_operation(operation.id, OpState.DONE, promise=off, record=RECORD, move=move)
    found = store.pool.reservation(demand.id)
    assert (found.state, found.granted.memory) == (Held.HELD, 8)
    (gone,) = store.pool.away(HOST)
    assert replace(gone, id=0) == away

    back = begin(store, "web", kind=Kind.RESUME)
    store.close_operation(back.id, OpState.DONE, promise=promise, record=RECORD, move=PoolMove(back="uuid-web", at=3.0))
    assert store.pool.away(HOST) == ()
    assert [a.returned_at for a in store.pool.away(HOST, returned=True)] == [3.0]
