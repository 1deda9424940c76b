"""Three real guests on a host with room for them and little more: one goes for a demand, is told before, is saved, and
comes back with what was worked out for it; its neighbours give it room, and get their own again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from host.outside import MIB, Guest, await_true
from host.site import Site
from hvctl.adapters import notice
from hvctl.decide.interrupt import Ask
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.allocation import Resources
from hvctl.model.pool import Held, Need, Rung
from hvctl.model.vm import Vm
from hvctl.operations import comeback, interrupt, pool

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

SIZE = 320 * MIB
CAPACITY = 3 * SIZE + 120 * MIB
NEEDED = 200 * MIB
PREDICTED = 352 * MIB
HOUR = 3600.0
HOOK = """mkdir -p /etc/hvctl/notice.d
printf '#!/bin/sh\\n[ -e /run/seen ] || cp "$1" /run/seen\\ntouch /run/hvctl/ready\\n' > /etc/hvctl/notice.d/seen
chmod 755 /etc/hvctl/notice.d/seen"""


class Own:
    """libvirt with the VMs of this test alone: others of this host would count against its capacity."""

    def __init__(self, domains: Any, prefix: str) -> None:
        self._domains = domains
        self._prefix = prefix

    def list(self) -> tuple[Vm, ...]:
        return tuple(vm for vm in self._domains.list() if vm.name.startswith(self._prefix))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domains, name)


@contextmanager
def small_host(site: Site, later: float = 0.0) -> Iterator[Engine]:
    """hvctl on a host with CAPACITY bytes to promise, `later` seconds from now."""
    settings = replace(site.settings, cpu_overcommit=1000.0)
    with open_engine(settings) as engine:
        engine.host = replace(engine.host, domains=Own(engine.host.domains, site.prefix))
        engine.settings = replace(settings, reserve_memory=engine.facts.memory - CAPACITY)
        engine.clock = lambda: time.time() + later
        yield engine


def test_one_goes_for_another_and_comes_back(site: Site) -> None:
    with ExitStack() as made:
        size = ("--memory", "320MiB", "--start")
        goes, near, far = (made.enter_context(site.created(*size)) for _ in range(3))
        site.ok("vm", "set", goes.name, "--interruptible", "--priority", "100")
        site.ok("vm", "set", far.name, "--interruptible", "--priority", "900")
        goes.run(HOOK)
        goes.mark("work")
        whole = goes.mem_total()

        def needs(vm: Vm, gap: float) -> Need:
            assert gap == HOUR
            promised = Resources(100, SIZE)
            return Need(Resources(100, PREDICTED), "its profile", True) if vm.name == goes.name else Need(promised, "-")

        with small_host(site) as engine:
            engine.needs = needs
            ask = Ask(Resources(memory=NEEDED), "ci-9", seconds=2 * HOUR, back=HOUR, rungs=(Rung.SAVE,), grace=60.0)
            planned = interrupt.for_need(engine, ask, dry_run=True)
            assert planned.plan is not None
            assert [t.seen.vm.name for t in planned.plan.turns] == [goes.name]
            assert near.memory() + far.memory() == 2 * SIZE
            report = interrupt.for_need(engine, ask)
        assert report.demand is not None
        assert (report.demand.state, report.demand.granted) == (Held.HELD, Resources(memory=NEEDED))
        assert goes.state == "shut off"
        gave = 2 * SIZE - near.memory() - far.memory()
        assert gave == PREDICTED - (CAPACITY - 2 * SIZE - NEEDED)
        (gone,) = [o for o in report.outcomes if o.kind == "interrupt"]
        assert next(s.facts for s in gone.steps if s.name == "notify_guest") == {
            "told": True,
            "by": ["line", "document"],
            "ready": True,
        }

        with small_host(site, later=HOUR + 1) as engine:
            back = comeback.due(engine)
            assert back.left == ()
            assert len(back.warnings) == len(report.outcomes) - 1, "there is no room for the neighbours yet"
            took = {s.name: s.seconds for s in back.outcomes[0].steps}
            print("after its start it has its memory in", took["set_memory"], "s; the start took", took["start"])
        assert goes.mem_total() - whole == PREDICTED - SIZE == goes.memory() - SIZE
        assert goes.marks() == ("work", "work")
        told = json.loads(goes.run("cat /run/seen"))
        assert (told["event"], told["how"]) == ("interruption", "save")
        assert "ci-9" in told["reason"]
        await_true(lambda: json.loads(goes.run("cat /run/hvctl/notice.json"))["event"] == "returned", "it is told")
        words = json.loads(goes.run("cat /run/hvctl/notice.json"))
        assert goes.run("cat /run/hvctl/notice.line").strip() == notice.line(words)

        with small_host(site, later=HOUR + 2) as engine:
            pool.release(engine, report.demand.id)
            assert comeback.due(engine).warnings == ()
            assert engine.store.pool.away(engine.facts.name) == ()
        assert (near.memory(), far.memory()) == (SIZE, SIZE)
        with small_host(site, later=4 * HOUR) as engine:
            assert pool.reservations(engine) == []


@pytest.mark.parametrize("point", ["notify_guest:after", "save_guest:before", "save_guest:after", "clear_nics:after"])
def test_an_interruption_that_was_killed_is_done_again(site: Site, vm: Guest, point: str) -> None:
    vm.mark(point.replace(":", "-"))
    site.ok("vm", "set", vm.name, "--interruptible")
    done = site.run("interrupt", vm.name, "--grace", "1", fault=f"interrupt:{point}=kill")
    assert done.returncode == -9, done.stderr
    (ended,) = site.json("recover")
    assert (ended["kind"], ended["state"]) == ("interrupt", "done")
    assert vm.state == "shut off"
    site.ok("resume", vm.name)
    assert vm.marks() == (point.replace(":", "-"),) * 2
    site.ok("vm", "set", vm.name, "--no-interruptible")


def test_paused_squeezed_and_shut_down(site: Site, vm: Guest) -> None:
    """A guest that does not know of notices is given its time, and no more."""
    vm.mark("kept")
    site.ok("vm", "set", vm.name, "--interruptible")
    site.ok("interrupt", vm.name, "--how", "pause", "--grace", "0.1")
    assert vm.state == "paused"
    site.ok("resume", vm.name)
    assert vm.state == "running"
    site.ok("interrupt", vm.name, "--how", "squeeze", "--grace", "0.1")
    assert vm.memory() < 256 * MIB
    assert vm.cpu()[1] == 10
    site.ok("resume", vm.name)
    assert (vm.memory(), vm.cpu()[1], vm.marks()) == (256 * MIB, None, ("kept", "kept"))
    done = site.json("interrupt", vm.name, "--how", "shutdown", "--grace", "30")["operations"]
    assert next(s["facts"]["how"] for s in done[0]["steps"] if s["name"] == "end_guest") == "powered off"
    assert vm.state == "shut off"
    site.ok("resume", vm.name)
    vm.await_boot()
    site.ok("vm", "set", vm.name, "--no-interruptible")
