"""Three real guests on a host with room for them and little more: one goes for a demand, is told before, is saved, and
comes back with what was worked out for it; its neighbours give it room, and get their own again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hvctl
from host.foreign import foreign
from host.outside import MIB, Guest, await_true, virsh
from host.site import Site
from host.test_prepare import ROOM
from hvctl.adapters.guest import notice
from hvctl.decide.interrupt import Ask
from hvctl.decide.victims import LADDER
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.model.allocation import Change, Resources
from hvctl.model.pool import Held, Need, Rung
from hvctl.model.vm import Vm
from hvctl.operations import comeback, interrupt, pool
from hvctl.operations import vm as vms
from hvctl.operations.allocate import allocate

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

SIZE = 320 * MIB
CAPACITY = 3 * SIZE + 120 * MIB
NEEDED = 200 * MIB
PREDICTED = 352 * MIB
HOUR = 3600.0
OWN_LIBVIRTD = (
    *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", ROOM, "room"),
    sys.executable,
)
HOOK = """mkdir -p /etc/hvctl/notice.d
printf '#!/bin/sh\\n[ -e /run/seen ] || cp "$1" /run/seen\\ntouch /run/hvctl/ready\\n' > /etc/hvctl/notice.d/seen
chmod 755 /etc/hvctl/notice.d/seen"""

# A word for another interruption, then the right one, then all is as before.
ALONE = """rm -f /run/hvctl/notice.line
cp /etc/inittab /run/inittab; sed -i /hvctl-agent/d /etc/inittab
told() { until grep -q "^notice $1 " /run/hvctl/notice.line; do sleep 0.02; done; }
(told interruption; hvctl-ready 0123456789abcdef0123456789abcdef
told returned; told interruption; hvctl-ready
told returned; cp /run/inittab /etc/inittab; kill -HUP 1) > /dev/null 2>&1 &"""
# The agent answers this before init ends it.
LEAVE = '{"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", "kill -HUP 1"]}}'


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


def test_a_guest_that_ignores_the_notice_has_its_grace_and_goes(site: Site, vm: Guest) -> None:
    with small_host(site) as engine:
        vms.configure(engine, vm.name, interruptible=True)
        (done,) = interrupt.vms(engine, [vm.name], Rung.PAUSE, back=HOUR, grace=2.0, reason="a test")
        told = next(s for s in done.steps if s.name == "notify_guest")
        assert told.facts == {"told": True, "by": ["line", "document"], "ready": False}
        assert told.seconds >= 2
        assert vm.state == "paused"
        comeback.resume(engine, [vm.name])
        vms.configure(engine, vm.name, interruptible=False)


def test_a_guest_without_an_agent_says_on_its_port_that_it_is_ready(site: Site, vm: Guest) -> None:
    """Only for the interruption that it is told of: else it has its grace, and an hour would be too long to wait."""
    with small_host(site) as engine:
        vms.configure(engine, vm.name, interruptible=True)
        vm.run(ALONE)
        virsh("qemu-agent-command", vm.uuid, LEAVE)
        await_true(lambda: not vm.answers(), "the agent is gone")
        for grace, ready in ((2.0, False), (HOUR, True)):
            (done,) = interrupt.vms(engine, [vm.name], Rung.PAUSE, back=HOUR, grace=grace, reason="a test")
            told = next(s for s in done.steps if s.name == "notify_guest")
            assert told.facts == {"told": True, "by": ["line"], "ready": ready}
            assert vm.state == "paused"
            print("the notice took", told.seconds, "s")
            comeback.resume(engine, [vm.name])
        vm.await_answer()
        vms.configure(engine, vm.name, interruptible=False)


def test_a_guest_without_a_balloon_is_shrunk_by_nothing_and_saved(site: Site) -> None:
    """One without a kernel, too, that no power button ends."""
    with foreign(site, boots=False, balloon="none") as guest, small_host(site) as engine:
        virsh("start", guest.uuid)
        allocate(engine, guest.name, Change(cpu_weight=90))
        vms.configure(engine, guest.name, interruptible=True)
        free = next(r["free"] for r in pool.show(engine) if r["resource"] == "memory")
        ask = Ask(Resources(memory=free + 16 * MIB), "ci-9", seconds=60.0, back=HOUR, rungs=LADDER[:3], grace=0.0)
        report = interrupt.for_need(engine, ask)
        assert report.plan is not None
        turns = [(t.seen.vm.name, t.rung) for t in report.plan.turns]
        assert (turns, report.plan.shrinks) == ([(guest.name, Rung.SAVE)], ()), "a squeeze gives CPU alone"
        assert guest.state == "shut off"
        assert report.demand is not None
        pool.release(engine, report.demand.id)
        comeback.resume(engine, [guest.name])
        assert guest.state == "running"
        (done,) = interrupt.vms(engine, [guest.name], Rung.SHUTDOWN, back=HOUR, grace=1.0, reason="a test")
        ended = next(s for s in done.steps if s.name == "end_guest")
        assert (ended.facts["how"], ended.seconds >= 1) == ("its process was ended", True)
        assert any("did not power off in 1 s" in w for w in done.warnings)
        assert guest.state == "shut off"


@pytest.mark.skipif(Path("/proc/1/comm").read_text().strip() == "systemd", reason="systemd starts the daemons here")
def test_libvirtd_restarts_between_the_notice_and_the_save() -> None:
    """A libvirtd of the test's own, in namespaces that end with it: the host's has the VMs of other tests."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [*OWN_LIBVIRTD, "-m", "host.restarted", f"hvctl-interrupt-{os.getpid()}"],
        env={**os.environ, "PYTHONPATH": f"{Path(hvctl.__file__).parents[1]}:{tests}"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["another libvirtd"], "it was restarted, and once"
    assert seen["steps"] == ["notify_guest", "save_guest", "clear_nics"]
    assert (seen["state"], seen["after"], seen["marks"]) == ("shut off", "running", ["kept", "kept"])
    assert seen["open"] == 0


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
