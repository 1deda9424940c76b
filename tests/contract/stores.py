"""A store on each database that hvctl supports, and what tests of it say often."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.store.store import Store
from hvctl.errors import BusyError, RefusedError
from hvctl.model.allocation import Resources
from hvctl.model.host import Ledger
from hvctl.model.operation import Kind, Operation

HOST = "node1"


@pytest.fixture(name="url", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/hvctl.db"
        return
    cluster = request.getfixturevalue("postgresql")
    database = cluster.create()
    yield database
    cluster.drop(database)


@pytest.fixture(name="store")
def migrated_store(url: str) -> Iterator[Store]:
    with Store(url) as opened:
        opened.migrate()
        yield opened


def begin(
    store: Store,
    vm: str,
    *,
    host: str = HOST,
    kind: Kind = Kind.ALLOCATE,
    key: str | None = None,
    held: Resources | None = None,
    admit: Callable[[Ledger], None] | None = None,
    **changed: Any,
) -> Operation:
    row: dict[str, Any] = {"request": {"vcpus": 2}, "before": {"was_running": True}, "who": "root", "boot_id": "boot"}
    return store.open_operation(
        vm_uuid=f"uuid-{vm}", vm_name=vm, host=host, kind=kind, key=key, held=held, admit=admit, **row | changed
    )


def memory_held(ledger: Ledger) -> int:
    return sum(p.resources.memory for p in ledger.promised if p.holds)


def within(capacity: int, want: int) -> Callable[[Ledger], None]:
    """An admission check for memory alone."""

    def admit(ledger: Ledger) -> None:
        if memory_held(ledger) + want > capacity:
            raise RefusedError("memory lacks.")

    return admit


def at_once(count: int, ask: Callable[[int], str], barrier: threading.Barrier | Barrier | None = None) -> list[str]:
    """The answers of `count` threads that start together. A lock not had in time is asked for again, as people do."""
    start = barrier or threading.Barrier(count)

    def one(number: int) -> str:
        start.wait()
        for _ in range(10):
            try:
                return ask(number)
            except BusyError as e:
                if "open operation" in e.message:
                    return "busy"
        return "locked"

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def ask_for_memory(url: str, first: int, count: int, barrier: Barrier, capacity: int, want: int) -> list[str]:
    """`count` threads of one process, each with a store of its own, ask `want` for VMs first, first + 1…"""

    def ask(number: int) -> str:
        with Store(url) as mine:
            try:
                begin(mine, f"vm{first + number}", held=Resources(memory=want), admit=within(capacity, want))
            except RefusedError:
                return "refused"
            return "granted"

    return at_once(count, ask, barrier)
