"""Many ask at once, each with an engine of its own: exactly as many are granted as fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from faults.command import FakeSite

from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, RefusedError
from hvctl.model.allocation import Resources
from hvctl.model.pool import Held, Reservation
from hvctl.model.vm import State
from hvctl.operations import interrupt, pool
from unit.poolhost import MIB, add, journal, reserved, saves, small

ASKS = 50


def at_once(site: FakeSite, memory: int, jobs: list[Callable[[Engine], object]]) -> list[object]:
    start = threading.Barrier(len(jobs))

    def one(job: Callable[[Engine], object]) -> object:
        with small(site, memory, checked=False) as engine:
            start.wait()
            while True:
                try:
                    return job(engine)
                except BusyError:  # on a busy machine the database's lock may take longer than its wait: ask again
                    continue
                except HvctlError as e:
                    return e

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(one, jobs))


def wanted(number: int) -> pool.Wanted:
    return pool.Wanted(f"r{number}", "", Resources(memory=100 * MIB), 1000.0, None)


def test_fifty_asks_for_the_last_three_units(site: FakeSite) -> None:
    add(site, "vm", memory=512)
    jobs: list[Callable[[Engine], object]] = [
        lambda engine, i=i: pool.reserve(engine, wanted(i)) for i in range(ASKS)  # type: ignore[misc]
    ]  # fmt: skip
    answers = at_once(site, 512 + 399, jobs)
    granted = [a for a in answers if isinstance(a, Reservation)]
    refused = [a for a in answers if isinstance(a, RefusedError)]
    assert (len(granted), len(refused)) == (3, ASKS - 3), answers
    with small(site, 512 + 399) as engine:
        assert set(reserved(engine)) == {r.owner for r in granted}
        assert all("memory lacks" in e.message for e in refused)


def test_demands_that_want_the_same_victims(site: FakeSite) -> None:
    """Three victims of 512 MiB, six demands of 400: three find one each, three are refused; nobody goes for nothing."""
    for i in range(3):
        add(site, f"spot-{i}")
    jobs: list[Callable[[Engine], object]] = [
        lambda engine, i=i: interrupt.for_need(engine, saves(400, owner=f"d{i}")) for i in range(6)  # type: ignore[misc]
    ]  # fmt: skip
    answers = at_once(site, 3 * 512, jobs)
    with small(site, 3 * 512) as engine:
        held = [r for r in reserved(engine).values() if r.owner.startswith("d")]
        assert all((r.state, r.granted.memory) == (Held.HELD, 400 * MIB) for r in held), answers
        off = [vm for vm in site.world.read().vms.values() if vm.state is State.OFF]
        assert len(held) == len([a for a in answers if isinstance(a, interrupt.Report)]) >= 1
        assert 400 * len(held) <= 512 * len(off)
        assert len([o for o in journal(engine, "interrupt") if o.state == "done"]) == len(off)
