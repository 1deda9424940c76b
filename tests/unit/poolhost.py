"""A fake host with little room, and what is promised and reserved of it, checked at every step of every operation."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from faults.command import FakeSite

from hvctl.adapters.fake import open_fake
from hvctl.adapters.store.store import Store
from hvctl.decide.admission import holders
from hvctl.decide.interrupt import Ask
from hvctl.decide.reservations import FOREVER, kept_by_others
from hvctl.engine.handover import capacity
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.model.allocation import Allocation, Record, Resources
from hvctl.model.operation import Operation
from hvctl.model.pool import Away, Reservation, Rung

MIB = 1 << 20
HOUR = 3600.0
TOTAL = 64 << 30


def add(site: FakeSite, name: str, memory: int = 512, used: int = 100, vcpus: int = 1, **record: Any) -> str:
    """A running VM of hvctl's, interruptible unless it is said otherwise; its uuid follows from its name."""
    made = Record(Allocation(vcpus, memory * MIB), **({"interruptible": True} | record))
    uuid = str(uuids.uuid5(uuids.NAMESPACE_DNS, name))
    return site.world.add_vm(
        name, uuid=uuid, vcpus=vcpus, memory=memory * MIB, max_memory=4096 * MIB, nics=0, disks=(), record=made,
        behaviour={"used_memory": used * MIB},
    )  # fmt: skip


@contextmanager
def small(
    site: FakeSite, memory: int, *, later: float = 0.0, checked: bool = True, ever: bool = True
) -> Iterator[Engine]:
    """hvctl on a host of `memory` MiB that can be promised; the clock stands at 1000 s and `later`. ever: what is
    reserved for later is checked, too, which an owner who stays after its own reservation may be in the way of."""
    settings = replace(site.settings, reserve_memory=TOTAL - memory * MIB, cpu_overcommit=1.0, lock_wait=60.0)
    with Store(settings.database) as store:
        engine = Engine(settings, open_fake(site.world.uri), store)
        engine.clock = lambda: 1000.0 + later
        if checked:
            engine.progress = lambda _: within(engine, ever)
        yield engine
        within(engine, ever)


def within(engine: Engine, ever: bool = True) -> None:
    """Whatever is promised now, and reserved now or later, fits."""
    ledger, most = engine.store.ledger(engine.facts.name), capacity(engine)
    held = holders(ledger, observe_all(engine.host))
    kept = kept_by_others(ledger.reservations, held, frozenset(), engine.clock(), FOREVER if ever else engine.clock())
    taken = sum((r for _, r in held.values()), Resources()) + kept
    assert taken.memory <= most.memory, (taken, most)
    assert taken.cpu <= most.cpu, (taken, most)


def ask(memory: int = 0, cpu: int = 0, owner: str = "new", iops: int = 0, **more: Any) -> Ask:
    return Ask(Resources(cpu, memory * MIB, iops=iops), owner, **({"seconds": HOUR, "back": HOUR, "grace": 1.0} | more))


def saves(memory: int, **more: Any) -> Ask:
    return ask(memory, rungs=(Rung.SAVE,), **more)


def reserved(engine: Engine) -> dict[str, Reservation]:
    return {r.owner: r for r in engine.store.pool.reservations(engine.facts.name)}


def gone(engine: Engine) -> dict[str, Away]:
    return {a.vm_name: a for a in engine.store.pool.away(engine.facts.name)}


def journal(engine: Engine, kind: str) -> list[Operation]:
    return [o for o in engine.store.operations(engine.facts.name) if o.kind == kind]
