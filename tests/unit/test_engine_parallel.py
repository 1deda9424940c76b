"""Many operators at once, each with an engine of its own: capacity is never promised twice, a key is one operation."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import BusyError, Exit, HvctlError, NotUndoneError, RefusedError, UndoneError
from hvctl.model.allocation import Change
from hvctl.model.operation import OpState, Outcome
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from unit.enginehost import MIB, add_image, last, new_vm, promised

ASKS = 50
ROOM = 3


def at_once(site: FakeSite, jobs: Sequence[Callable[[Engine], Outcome]], **settings: Any) -> list[Outcome | HvctlError]:
    """Every job on an engine of its own, all let go at the same moment."""
    start = threading.Barrier(len(jobs))
    chosen = replace(site.settings, lock_wait=60.0, **settings)

    def one(job: Callable[[Engine], Outcome]) -> Outcome | HvctlError:
        with open_engine(chosen) as engine:
            start.wait()
            try:
                return job(engine)
            except HvctlError as e:
                return e

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(one, jobs))


def test_fifty_starts_and_room_for_three(site: FakeSite) -> None:
    for i in range(ASKS):
        site.world.add_vm(f"vm-{i}", running=False, memory=1 << 30, nics=0, disks=())

    def start(name: str) -> Callable[[Engine], Outcome]:
        return lambda engine: verbs.start(engine, name)

    reserve = (64 << 30) - (ROOM << 30)
    answers = at_once(site, [start(f"vm-{i}") for i in range(ASKS)], reserve_memory=reserve)
    granted = [a for a in answers if isinstance(a, Outcome)]
    refused = [a for a in answers if isinstance(a, RefusedError)]
    assert (len(granted), len(refused)) == (ROOM, ASKS - ROOM), answers
    assert sum(vm.state.active for vm in site.world.read().vms.values()) == ROOM
    holding = {a.vm_name for a in granted}
    assert all("memory lacks" in e.message for e in refused)
    assert all(e.hint and e.hint.startswith("held by") for e in refused)
    assert {w for e in refused for w in (e.hint or "").split() if w.startswith("vm-")} <= holding
    with open_engine(site.settings) as engine:
        assert {p.vm_name for p in engine.store.promises(engine.facts.name) if p.holds} == holding


ASKER = """
import sys
from hvctl.engine.runtime import open_engine
from hvctl.errors import HvctlError
from hvctl.model.allocation import Change
from hvctl.operations.allocate import allocate
from hvctl.settings import load_settings
with open_engine(load_settings()) as engine:
    print("ready", flush=True)
    sys.stdin.readline()
    for name in sys.argv[1:]:
        try:
            print(name, allocate(engine, name, Change(memory=512 << 20)).state.value)
        except HvctlError as e:
            print(name, int(e.exit))
"""


def test_processes_that_ask_for_the_last_gibibyte(site: FakeSite) -> None:
    """16 running VMs of 256 MiB ask for 512 MiB each, from four processes: four of them find room."""
    names = [f"vm-{i}" for i in range(16)]
    for name in names:
        site.world.add_vm(name, nics=0, disks=())
    reserve = (64 << 30) - 16 * 256 * MIB - 4 * 256 * MIB
    environment = {**os.environ, **site.environment, "HVCTL_RESERVE_MEMORY": f"{reserve}B"}
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASKER, *names[i::4]],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    for asker in askers:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n"
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write("\n")
        asker.stdin.flush()
    answers = [line.split()[1] for asker in askers for line in asker.communicate()[0].splitlines()]
    assert Counter(answers) == {"done": 4, str(int(Exit.REFUSED)): 12}
    assert sum(vm.allocation.memory for vm in site.world.read().vms.values()) == 20 * 256 * MIB


# --- idempotency keys


def same(answer: Outcome | HvctlError) -> tuple[Any, ...]:
    """What of an answer the caller relies on: how long it took and which steps are shown may differ."""
    assert isinstance(answer, Outcome), answer
    return (answer.kind, answer.vm_uuid, answer.vm_name, answer.state, answer.operation, answer.result, answer.warnings)


@pytest.mark.parametrize("verb", ["allocate", "create", "take"])
def test_ten_retries_of_one_request_are_one_operation(engine: Engine, site: FakeSite, verb: str) -> None:
    add_image(site)
    if verb != "create":
        verbs.create(engine, new_vm("a"))
    jobs: dict[str, Callable[[Engine], Outcome]] = {
        "allocate": lambda e: allocate(e, "a", Change(cpu_quota=50), key="k1"),
        "create": lambda e: verbs.create(e, new_vm("a"), key="k1"),
        "take": lambda e: snapshots.take(e, "a", "s", key="k1"),
    }
    answers = at_once(site, [jobs[verb]] * 10)
    assert len({repr(same(a)) for a in answers}) == 1, answers
    assert len(engine.store.operations(engine.facts.name)) == (1 if verb == "create" else 2)
    assert len(site.world.read().vms) == 1
    assert same(jobs[verb](engine)) == same(answers[0])


def test_a_key_is_of_one_kind(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    verbs.create(engine, new_vm("a"), key="k1")
    with pytest.raises(RefusedError, match="this key was used for create of a"):
        allocate(engine, "a", Change(cpu_quota=50), key="k1")
    assert site.world.vm("a").allocation.cpu_quota is None


def test_a_key_is_of_one_request(engine: Engine, site: FakeSite) -> None:
    """A retry is told what was done; a request that was not done is not told that it was."""
    add_image(site)
    for name in ("a", "b"):
        verbs.create(engine, new_vm(name))
    allocate(engine, "a", Change(cpu_quota=50), key="k1")
    for name, change in (("a", Change(cpu_quota=60)), ("b", Change(cpu_quota=50))):
        with pytest.raises(RefusedError, match="used for allocate of a, which was not the same request"):
            allocate(engine, name, change, key="k1")
    assert [site.world.vm(n).allocation.cpu_quota for n in ("a", "b")] == [50, None]
    assert allocate(engine, site.world.vm("a").uuid, Change(cpu_quota=50), key="k1").state is OpState.DONE


def test_a_retry_of_what_failed_says_how_it_ended(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    verbs.create(engine, new_vm("a"))
    site.world.fail("set_cpu_quota")
    for _ in range(2):
        with pytest.raises(UndoneError):
            allocate(engine, "a", Change(cpu_quota=50), key="k1")
    snapshots.take(engine, "a", "s")
    site.world.fail("load_state", "GuestError")
    for _ in range(2):
        with pytest.raises(NotUndoneError):
            snapshots.reset(engine, "a", "s", key="k2")


def test_a_retry_after_the_owners_death_recovers_it(engine: Engine, site: FakeSite) -> None:
    """The caller that lost its answer asks again with the same key: it must not be told to wait for a dead process."""
    add_image(site)
    verbs.create(engine, new_vm("a"))
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    site.world.fail("restore_ram")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s", key="k1")
    outcome = snapshots.reset(engine, "a", "s", key="k1")
    assert (outcome.state, outcome.operation) == (OpState.DONE, last(engine).id)
    assert not any("spoiled" in text for text in site.world.content("a").values())


# --- one operation per VM


def test_many_changes_of_one_vm_take_turns(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    uuid = verbs.create(engine, new_vm("a")).vm_uuid

    def ask(quota: int) -> Callable[[Engine], Outcome]:
        return lambda e: allocate(e, "a", Change(cpu_quota=quota))

    answers = at_once(site, [ask(q) for q in range(10, 20)])
    assert {a.state for a in answers if isinstance(a, Outcome)} == {OpState.DONE}
    rows = [o for o in engine.store.operations(engine.facts.name) if o.kind == "allocate"]
    spans = sorted((o.opened_at, o.closed_at or "") for o in rows)
    assert len(spans) == 10
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "two were open at once"
    record = promised(engine)[uuid][1]
    assert record.allocation.cpu_quota == site.world.vm("a").allocation.cpu_quota
    assert list(site.settings.locks_dir.iterdir()) == []


def test_who_does_not_wait_is_told_busy(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    uuid = verbs.create(engine, new_vm("a")).vm_uuid
    with vm_lock(site.settings.locks_dir, uuid, 0):
        (answer,) = at_once(site, [lambda e: _impatient(e)])
    assert isinstance(answer, BusyError)


def _impatient(engine: Engine) -> Outcome:
    engine.settings = replace(engine.settings, lock_wait=0.0)
    return allocate(engine, "a", Change(cpu_quota=50))
