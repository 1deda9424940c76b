"""The contract of the store, the same on SQLite and PostgreSQL: journal, promises, and what several askers may get."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from hvctl.adapters.store import database
from hvctl.adapters.store.store import Store
from hvctl.errors import BusyError, HvctlError, NotFoundError, RefusedError
from hvctl.model.allocation import Allocation, NicLimit, Record, Resources
from hvctl.model.host import FORGET, Ledger, Promise
from hvctl.model.operation import Kind, OpState, StepRecord
from tests.contract.stores import (  # noqa: F401
    HOST,
    ask_for_memory,
    at_once,
    begin,
    database_url,
    memory_held,
    migrated_store,
    within,
)
from tests.postgresql import postgresql_cluster  # noqa: F401

GIB = 1 << 30
LARGE = Resources(cpu=2**40, memory=2**61, network=2**50, iops=2**33)


def promise(vm: str, resources: Resources, *, holds: bool = True) -> Promise:
    return Promise(f"uuid-{vm}", vm, resources, holds)


def test_an_operation_reads_back_as_it_was_opened(store: Store) -> None:
    request = {"memory": 2**61, "nics": [{"mac": "52:54:00:00:00:01", "inbound": None}], "text": "ä\x00\ud800"}
    opened = begin(store, "web", key="k1", held=LARGE, request=request)
    assert store.operation(opened.id) == opened
    assert opened.state is OpState.OPEN
    assert opened.closed_at is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", opened.opened_at)
    assert datetime.fromisoformat(opened.opened_at).utcoffset().total_seconds() == 0


def test_closing_keeps_state_reason_result_and_steps(store: Store) -> None:
    opened = begin(store, "web")
    steps = (
        StepRecord("set_vcpus", "count=2", 0.25, "done", {"vcpus": 2}),
        StepRecord("set_memory", "target=1", 1.5, "failed: the guest gives no more", {}),
    )
    store.close_operation(opened.id, OpState.UNDONE, reason="it did not fit", result={"undone": 1}, steps=steps)
    closed = store.operation(opened.id)
    assert closed.state is OpState.UNDONE
    assert closed.reason == "it did not fit"
    assert closed.result == {"undone": 1}
    assert closed.steps == steps
    assert closed.closed_at is not None
    assert closed.closed_at >= closed.opened_at


def test_steps_of_a_recovery_follow_those_that_are_there(store: Store) -> None:
    opened = begin(store, "web")
    first, second, third = (StepRecord(name, "", 0.0, "done") for name in ("pause", "load_state", "resume"))
    store.append_steps(opened.id, [first])
    store.append_steps(opened.id, [])
    store.append_steps(opened.id, [second])
    store.close_operation(opened.id, OpState.DONE, steps=[third])
    assert store.operation(opened.id).steps == (first, second, third)


def test_closing_twice_is_closing_once_and_never_changes_the_verdict(store: Store) -> None:
    opened = begin(store, "web", held=Resources(memory=GIB))
    step = StepRecord("pause", "", 0.0, "done")
    store.close_operation(
        opened.id, OpState.DONE, reason="first", steps=[step], promise=promise("web", Resources(memory=GIB))
    )
    closed = store.operation(opened.id)
    store.close_operation(opened.id, OpState.DONE, reason="second", steps=[step], promise=FORGET)
    with pytest.raises(HvctlError, match="ended as done"):
        store.close_operation(opened.id, OpState.FAILED, promise=FORGET)
    assert store.operation(opened.id) == closed
    assert store.promise_of(HOST, "uuid-web") == promise("web", Resources(memory=GIB))


def test_what_is_not_there(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no operation 7"):
        store.operation(7)
    with pytest.raises(NotFoundError):
        store.close_operation(7, OpState.DONE)
    assert store.promise_of(HOST, "uuid-web") is None
    assert store.record_of(HOST, "uuid-web") is None
    assert store.ledger(HOST) == Ledger()


def test_words_of_a_guest_cannot_keep_an_operation_open(store: Store) -> None:
    opened = begin(store, "web", who="ro\udce4ot", key="a\0b")
    store.close_operation(
        opened.id,
        OpState.FAILED,
        reason="agent: \0\udcff\ud800ö",
        steps=[StepRecord("agent", "\0", 0.0, "\0", {"out": "\0"})],
    )
    closed = store.operation(opened.id)
    assert closed.reason is not None
    assert closed.reason.startswith("agent: ")
    assert closed.reason.endswith("ö")
    assert closed.steps[0].facts == {"out": "\0"}
    assert begin(store, "web", key="a\0b").id == opened.id


def test_lists_are_newest_first_and_filtered(store: Store) -> None:
    one = begin(store, "web")
    store.close_operation(one.id, OpState.DONE)
    two = begin(store, "web", kind=Kind.RESET)
    three = begin(store, "db")
    elsewhere = begin(store, "web", host="node2")
    everything = [o.id for o in store.operations()]
    assert everything == sorted([one.id, two.id, three.id, elsewhere.id], reverse=True)
    assert [o.id for o in store.operations(HOST, limit=2)] == [three.id, two.id]
    assert [o.id for o in store.operations(vm_uuid="uuid-web", state=OpState.OPEN)] == [elsewhere.id, two.id]
    assert store.operations(HOST, vm_name="db") == (three,)
    assert store.open_operations(HOST) == (three, two)
    assert store.operations(HOST, "uuid-web", limit=1) == (two,)


# --- exclusion


def test_the_second_opener_of_a_vm_is_told_who_has_it(store: Store) -> None:
    opened = begin(store, "web", kind=Kind.RESET, who="anna")
    with pytest.raises(BusyError) as caught:
        begin(store, "web")
    for fact in ("web", "reset", str(opened.id), "anna", opened.opened_at):
        assert fact in caught.value.message
    assert f"hvctl operation show {opened.id}" in (caught.value.hint or "")
    begin(store, "db")
    begin(store, "web", host="node2")
    store.close_operation(opened.id, OpState.QUARANTINED, reason="torn")
    begin(store, "web")


def test_the_database_itself_knows_the_rule_of_one_open_operation(store: Store, url: str) -> None:
    opened = begin(store, "web")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    twice = text(
        "INSERT INTO operation (host, vm_uuid, vm_name, kind, state, request, before, who, boot_id, opened_at)"
        " SELECT host, vm_uuid, vm_name, kind, state, request, before, who, boot_id, opened_at FROM operation"
    )
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(twice)
    store.close_operation(opened.id, OpState.DONE)
    with engine.begin() as connection:
        connection.execute(twice)
    engine.dispose()


def test_two_openers_of_one_vm_at_once(store: Store, url: str) -> None:
    def ask(number: int) -> str:
        with Store(url) as mine:
            return str(begin(mine, "web").id)

    answers = at_once(8, ask)
    assert sorted(answers)[-7:] == ["busy"] * 7
    assert [str(o.id) for o in store.operations()] == [a for a in answers if a != "busy"]


def test_one_key_is_one_operation_however_often_it_is_asked(store: Store, url: str) -> None:
    def ask(number: int) -> str:
        if number % 2:
            return str(begin(store, "web", key="k").id)
        with Store(url) as mine:
            return str(begin(mine, "web", key="k").id)

    assert len(set(at_once(10, ask))) == 1
    (only,) = store.operations()
    store.close_operation(only.id, OpState.DONE, result={"vcpus": 2}, steps=[StepRecord("pause", "", 0.0, "done")])
    again = begin(store, "web", key="k", request={"vcpus": 3}, admit=within(0, 1))
    assert again == store.operation(only.id) == store.operation_of_key(HOST, "k")
    assert store.operation_of_key("node2", "k") is None
    assert again.state is OpState.DONE
    assert begin(store, "web", host="node2", key="k").id != only.id


# --- what is promised


def test_a_promise_and_its_record_live_until_they_are_replaced_or_forgotten(store: Store) -> None:
    allocation = Allocation(2, GIB, cpu_quota=150, nics=(NicLimit("52:54:00:00:00:01", 10, None),))
    record = Record(allocation, image="micro", protected=True, labels={"team": "blue"})
    first = begin(store, "web")
    store.close_operation(first.id, OpState.DONE, promise=promise("web", LARGE), record=record)
    assert store.promises(HOST) == (promise("web", LARGE),)
    assert store.record_of(HOST, "uuid-web") == record
    assert store.promises("node2") == ()

    kept = begin(store, "web")
    store.close_operation(kept.id, OpState.UNDONE)
    assert store.promise_of(HOST, "uuid-web") == promise("web", LARGE)
    assert store.record_of(HOST, "uuid-web") == record

    smaller = promise("renamed", Resources(memory=1), holds=False)
    replaced = begin(store, "web")
    store.close_operation(
        replaced.id, OpState.DONE, promise=Promise("uuid-web", "renamed", Resources(memory=1), False), record=record
    )
    assert store.promises(HOST) == (Promise("uuid-web", smaller.vm_name, smaller.resources, False),)

    forgotten = begin(store, "web")
    store.close_operation(forgotten.id, OpState.DONE, promise=FORGET)
    assert store.promises(HOST) == ()
    assert store.record_of(HOST, "uuid-web") is None


def test_an_open_operation_counts_the_larger_of_before_and_after(store: Store) -> None:
    done = begin(store, "web")
    store.close_operation(done.id, OpState.DONE, promise=promise("web", Resources(cpu=400, memory=1), holds=False))
    begin(store, "web", held=Resources(cpu=100, memory=5))
    begin(store, "new", held=Resources(cpu=7))
    begin(store, "foreign")
    assert store.ledger(HOST).promised == (
        Promise("uuid-new", "new", Resources(cpu=7), True, busy=True),
        Promise("uuid-web", "web", Resources(cpu=400, memory=5), True, busy=True),
    )
    assert store.promises(HOST) == (promise("web", Resources(cpu=400, memory=1), holds=False),)


def test_an_operation_that_holds_nothing_leaves_the_promise_as_it_is(store: Store) -> None:
    done = begin(store, "web")
    store.close_operation(done.id, OpState.DONE, promise=promise("web", LARGE, holds=False))
    begin(store, "web", kind=Kind.PROTECT)
    assert store.ledger(HOST).promised == (Promise("uuid-web", "web", LARGE, False, busy=True),)


def test_admission_sees_the_ledger_and_a_refusal_writes_nothing(store: Store) -> None:
    seen: list[Ledger] = []
    opened = begin(store, "web", held=Resources(memory=6), admit=seen.append)
    with pytest.raises(RefusedError, match="memory lacks"):
        begin(store, "db", key="k", held=Resources(memory=5), admit=within(10, 5))
    assert seen == [Ledger()]
    assert store.operations() == (opened,)
    begin(store, "db", key="k", held=Resources(memory=4), admit=within(10, 4))
    begin(store, "cache", host="node2", held=Resources(memory=10), admit=within(10, 10))


def test_fifty_askers_in_four_processes_get_exactly_what_there_is(store: Store, url: str) -> None:
    """Capacity 20, each asks 3: six are granted, whoever they are; the database is new to all of them."""
    capacity, want, processes, threads = 20, 3, 4, 13
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, mp_context=context) as pool:
        barrier = manager.Barrier(processes * threads)
        asked = [
            pool.submit(ask_for_memory, url, n * threads, threads, barrier, capacity, want) for n in range(processes)
        ]
        answers = [a for one in asked for a in one.result()]
    assert answers.count("granted") == capacity // want
    assert answers.count("refused") == processes * threads - capacity // want
    assert memory_held(store.ledger(HOST)) == capacity // want * want
    assert len(store.open_operations(HOST)) == capacity // want


# --- crashes and locks


def test_a_process_killed_while_it_opens_leaves_nothing_and_no_lock(store: Store, url: str) -> None:
    begin(store, "db")
    dying = (
        "import os, signal, sys; from hvctl.adapters.store.store import Store\n"
        "from tests.contract.stores import begin\n"
        "begin(Store(sys.argv[1]), 'web', key='k', admit=lambda ledger: os.kill(os.getpid(), signal.SIGKILL))"
    )
    died = subprocess.run([sys.executable, "-c", dying, url], timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert [o.vm_name for o in store.operations()] == ["db"]
    assert begin(store, "web", key="k").vm_name == "web"


def test_an_operation_outlives_the_store_that_opened_it(store: Store, url: str) -> None:
    with Store(url) as dying:
        opened = begin(dying, "web", held=Resources(memory=3))
    assert store.open_operations(HOST) == (opened,)
    assert memory_held(store.ledger(HOST)) == 3


def test_a_lock_that_nobody_lets_go_of_is_an_answer_in_bounded_time(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(store, "db")
    monkeypatch.setattr(database, "WAIT", 1)
    held, release = threading.Event(), threading.Event()

    def hold(ledger: Ledger) -> None:
        held.set()
        assert release.wait(60)

    holder = threading.Thread(target=begin, args=(store, "web"), kwargs={"admit": hold})
    holder.start()
    try:
        assert held.wait(60)
        with Store(url) as other, pytest.raises(BusyError, match="locked"):
            begin(other, "cache")
    finally:
        release.set()
        holder.join()
    assert [o.vm_name for o in store.open_operations(HOST)] == ["web", "db"]
