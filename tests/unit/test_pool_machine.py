"""Any sequence of reservations, resizes, interruptions, returns and releases, with deaths of hvctl at any fault point,
and time that passes: after a recovery nothing is over capacity, nothing is lost, and who may not go did not."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults.command import FakeSite
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hvctl.adapters.fake import open_fake
from hvctl.adapters.store.store import Store
from hvctl.decide.admission import holders
from hvctl.decide.reservations import kept_by_others
from hvctl.engine.handover import capacity
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError
from hvctl.model.allocation import Change, Resources
from hvctl.model.pool import Held, Rung
from hvctl.model.vm import State
from hvctl.operations import comeback, interrupt, pool
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from hvctl.operations.journal import recover
from unit.poolhost import HOUR, MIB, TOTAL, add, ask
from unit.test_life_machine import MEMORY, Killed, Plan

pytestmark = pytest.mark.processes

NAMES = ("a", "b", "c", "guarded")
SPOTS = st.sampled_from(NAMES[:3])
SIZES = st.sampled_from((64, 256, 400, 900))
LASTS = st.sampled_from((None, HOUR / 2, HOUR, 3 * HOUR))
DEATH = st.none() | st.tuples(st.integers(0, 30), st.sampled_from(("kill", "kill", "raise")))
ALLOWED = st.sampled_from(((Rung.SAVE,), (Rung.SQUEEZE, Rung.PAUSE, Rung.SAVE), tuple(Rung)))


class Pools(RuleBasedStateMachine):
    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else self.template.parent))
        shutil.copy(self.template, self.folder / "hvctl.db")
        self.site = FakeSite(self.folder)
        self.settings = replace(
            self.site.settings, lock_wait=0.0, reserve_memory=TOTAL - 2100 * MIB, cpu_overcommit=1.0
        )
        self.store = Store(self.settings.database)
        self.now = 1000.0
        for name in NAMES:
            add(self.site, name, memory=512, used=100, interruptible=name != "guarded", priority=300)
        self.work = {n: self.site.world.content(n)["ram"] for n in NAMES}
        self.rough = False

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def fresh(self, death: tuple[int, str] | None = None) -> Engine:
        engine = Engine(self.settings, open_fake(self.site.world.uri), self.store)
        engine.clock = lambda: self.now
        if death:
            engine.faults = Plan([death])
        return engine

    def act(self, run: Callable[[Engine], object], death: tuple[int, str] | None) -> None:
        with contextlib.suppress(HvctlError, Killed):
            run(self.fresh(death))
        recover(self.fresh())

    @rule(owner=st.sampled_from(("x", "y", "a")), size=SIZES, lasts=LASTS, later=st.sampled_from((0.0, HOUR)),
          half_life=st.none() | st.just(600.0))  # fmt: skip
    def reserve(self, owner: str, size: int, lasts: float | None, later: float, half_life: float | None) -> None:
        start = self.now + later
        ends = None if lasts is None else start + lasts
        wanted = pool.Wanted(owner, "", Resources(memory=size * MIB), start, ends, half_life)
        self.act(lambda engine: pool.reserve(engine, wanted), None)

    @rule(pick=st.integers(0, 5))
    def release(self, pick: int) -> None:
        found = self.store.pool.reservations("fake")
        if found:
            self.act(lambda engine: pool.release(engine, found[pick % len(found)].id), None)

    @rule(name=st.sampled_from(NAMES), memory=st.sampled_from((256, 512, 700)), death=DEATH)
    def resize(self, name: str, memory: int, death: tuple[int, str] | None) -> None:
        self.act(lambda engine: allocate(engine, name, Change(memory=memory * MIB)), death)

    @rule(name=SPOTS, rung=st.sampled_from(tuple(Rung)), death=DEATH)
    def take(self, name: str, rung: Rung, death: tuple[int, str] | None) -> None:
        self.rough |= rung.loses_work
        run = {"back": HOUR, "grace": 0.1, "reason": "a test"}
        self.act(lambda engine: interrupt.vms(engine, [name], rung, **run), death)

    @rule(size=SIZES, cpu=st.sampled_from((0, 0, 1500)), lasts=LASTS, allowed=ALLOWED, by=st.booleans(), death=DEATH)
    def demand(
        self, size: int, cpu: int, lasts: float | None, allowed: tuple[Rung, ...], by: bool,
        death: tuple[int, str] | None,
    ) -> None:  # fmt: skip
        self.rough |= any(r.loses_work for r in allowed)
        until = self.now if by else None
        wanted = ask(size, cpu, "x", seconds=lasts, rungs=allowed, until=until, grace=0.1)
        self.act(lambda engine: interrupt.for_need(engine, wanted), death)

    @rule(death=DEATH)
    def come_back(self, death: tuple[int, str] | None) -> None:
        self.act(lambda engine: comeback.due(engine), death)

    @rule(name=SPOTS)
    def start(self, name: str) -> None:
        self.act(lambda engine: verbs.start(engine, name), None)

    @rule(seconds=st.sampled_from((60.0, HOUR / 2, HOUR)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.act(pool.show, None)
        self.act(interrupt.due, None)

    @invariant()
    def nothing_is_over_capacity_now(self) -> None:
        """But for an owner who stays after its own reservation: nobody ends it, and who is due waits."""
        engine = self.fresh()
        ledger, most = self.store.ledger("fake"), capacity(engine)
        held = holders(ledger, observe_all(engine.host))
        promised = sum((r for _, r in held.values()), Resources())
        assert promised.memory <= most.memory
        assert promised.cpu <= most.cpu
        kept = kept_by_others(ledger.reservations, held, frozenset(), self.now, self.now)
        assert (promised + kept).memory <= most.memory, (promised, kept)

    @invariant()
    def nothing_is_left_half_way(self) -> None:
        assert self.store.open_operations("fake") == ()
        assert not [r for r in self.store.pool.reservations("fake") if r.state is Held.WAITING]
        away = {a.vm_name: a for a in self.store.pool.away("fake")}
        for vm in self.site.world.read().vms.values():
            if vm.state is State.PAUSED:
                assert away[vm.name].rung is Rung.PAUSE
            if vm.state is State.OFF:
                assert vm.name in away, "gone, and nobody knows that it is to come back"
            if vm.saved is None and vm.live and vm.record:
                assert vm.live.memory == vm.record.allocation.memory

    @invariant()
    def who_may_not_be_interrupted_was_not(self) -> None:
        assert self.site.world.vm("guarded").state is State.RUNNING
        if not self.rough:
            for name in NAMES:
                vm = self.site.world.vm(name)
                assert (vm.saved.ram.text if vm.saved else vm.ram.text) == self.work[name], "its work is lost"


@pytest.mark.parametrize("steps", [14])
def test_any_life_of_a_pool(migrated: Path, steps: int) -> None:
    Pools.template = migrated
    run_state_machine_as_test(
        Pools,
        settings=settings(
            max_examples=60, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
