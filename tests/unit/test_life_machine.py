"""Any life of a few VMs on the fake host, with failures and deaths of hvctl at any fault point and other people at work
in between: after a sweep the contract of operations.md holds."""

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
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hvctl.adapters.fake import open_fake
from hvctl.adapters.store.store import Store
from hvctl.decide.admission import capacity_of, holders
from hvctl.engine import hands
from hvctl.engine.faults import Faults
from hvctl.engine.lock import free
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError
from hvctl.model.allocation import Change, DiskChange, NicChange, Resources
from hvctl.model.operation import OpState, Outcome
from hvctl.model.reset import AS_USUAL, DiskPart, Scope
from hvctl.model.vm import State
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from unit.enginehost import MIB, add_image, new_vm

pytestmark = pytest.mark.processes

# Thousands of commits: what they cost on a disk is no matter here.
MEMORY = Path("/dev/shm")


class Killed(BaseException):
    """kill -9 of hvctl: nothing of its code runs any more, and the kernel frees its locks."""


class Plan(Faults):
    """Fault points that count: at the nth from now it raises or dies, then the next of its deaths is armed."""

    def __init__(self, deaths: list[tuple[int, str]]) -> None:
        super().__init__("")
        self._deaths = list(deaths)

    def point(self, kind: str, step: str, when: str) -> None:
        if not self._deaths:
            return
        left, how = self._deaths[0]
        if left:
            self._deaths[0] = (left - 1, how)
            return
        del self._deaths[0]
        if how == "kill":
            raise Killed
        # Before the first step there is nothing that could fail: these points exist to be killed at.
        if step not in ("row", "begun", "closed", "close", "touching", "committed"):
            raise HvctlError(f"fault injected {when} {step}.")


NAMES = ("a", "b", "c")
SNAPSHOTS = st.sampled_from(("s", "t"))
PARTS = st.sampled_from(
    (
        Scope(True, False, ()),
        Scope(False, True, ()),
        Scope(True, True, ()),
        Scope(False, False, (DiskPart("vda"),)),
        Scope(False, False, (DiskPart("vda"),), net=True),
    )
)
picks = st.integers(0, 5)
death = st.tuples(st.integers(0, 14), st.sampled_from(("raise", "kill", "kill")))
deaths = st.just([]) | st.lists(death, max_size=2)
OUTSIDE = st.sampled_from((None, None, None, "pause", "resume", "destroy", "spoil", "allocate", "qdisc", "reboot_host"))
CHANGES = st.builds(
    Change,
    vcpus=st.integers(1, 4),
    memory=st.sampled_from((128, 256, 384, 768)).map(lambda m: m * MIB),
    cpu_quota=st.sampled_from((None, 50, 150)),
    nics=st.sampled_from(((), (NicChange(None, 10**7, 10**6),), (NicChange(None, None, None),))),
    disks=st.sampled_from(((), (DiskChange(None, iops=100),), (DiskChange(None, iops=None),))),
)


class Life(RuleBasedStateMachine):
    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else self.template.parent))
        shutil.copy(self.template, self.folder / "hvctl.db")
        self.site = FakeSite(self.folder)
        self.world = self.site.world
        # Room for three small VMs, or for fewer that grew.
        self.settings = replace(self.site.settings, lock_wait=0.0, reserve_memory=(64 << 30) - 1024 * MIB)
        self.store = Store(self.settings.database)
        self.engine = self.fresh([])
        self.torn_by_others: set[str] = set()
        self.paused_by_others: set[str] = set()
        self.rebooted = False
        add_image(self.site)
        verbs.create(self.engine, new_vm("a"))
        verbs.create(self.engine, new_vm("b", start=False))
        self.stored: dict[str, dict[str, str]] = {}
        self.keeps("a", lambda: snapshots.take(self.engine, "a", "s"))

    def keeps(self, name: str, take: Callable[[], Outcome | None]) -> Outcome | None:
        """Remembers what a snapshot must hold: nothing in a guest changes by itself."""
        before, known = self.world.content(name), {s.id for s in self.engine.host.machine.snapshots()}
        done = take()
        self.stored |= {s.id: before for s in self.engine.host.machine.snapshots() if s.id not in known}
        return done

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def fresh(self, plan: list[tuple[int, str]]) -> Engine:
        """hvctl, started for one command."""
        engine = Engine(self.settings, open_fake(self.world.uri), self.store)
        engine.faults = Plan(plan)
        return engine

    def act(self, run: Callable[[Engine], Outcome], plan: list[tuple[int, str]], outside: str | None) -> Outcome | None:
        """One command that may fail or die, somebody else after it, and a recovery that may die as well."""
        first, second = plan[:1], plan[1:]
        outcome = None
        with contextlib.suppress(HvctlError, Killed):
            outcome = run(self.fresh(first))
        if outside:
            self.others(outside)
        with contextlib.suppress(Killed):
            self.fresh([(n, "kill") for n, _ in second]).sweep()
        self.engine = self.fresh([])
        self.engine.sweep()
        return None if outside else outcome

    def others(self, what: str) -> None:
        before = {vm.uuid for vm in self.world.read().vms.values() if vm.torn}
        for vm in self.world.read().vms.values():
            try:
                match what:
                    case "allocate":
                        self.world.allocate(vm.name, cpu_weight=77)
                    case "qdisc" if vm.state.active and vm.nics[0].tap:
                        self.world.put_foreign_qdisc(vm.nics[0].tap)
                    case "pause" if vm.state is State.RUNNING:
                        self.world.pause(vm.name)
                        self.paused_by_others.add(vm.uuid)
                    case "resume" | "destroy" | "spoil":
                        getattr(self.world, what)(vm.name)
            except HvctlError:
                continue
        if what == "reboot_host":
            self.world.reboot_host()
            self.rebooted = True
        # A guest that is continued by hand in the middle of a reset is torn by that hand.
        self.torn_by_others |= {vm.uuid for vm in self.world.read().vms.values() if vm.torn} - before

    def names(self) -> list[str]:
        return sorted(vm.name for vm in self.world.read().vms.values())

    def one(self, pick: int, *states: State) -> str:
        """One of the VMs that there are, of those in these states if there are such."""
        fit = [vm.name for vm in self.world.read().vms.values() if vm.state in states] or self.names()
        return sorted(fit)[pick % len(fit)]

    def with_snapshots(self, pick: int) -> str:
        """One of those that can go back, if there are such."""
        of = {s.vm_uuid for s in self.engine.host.machine.snapshots()}
        fit = [vm.name for vm in self.world.read().vms.values() if vm.uuid in of] or self.names()
        return sorted(fit)[pick % len(fit)]

    # --- what hvctl does

    @precondition(lambda self: len(self.names()) < len(NAMES))
    @rule(start=st.booleans(), plan=deaths, outside=OUTSIDE)
    def create(self, start: bool, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = next(n for n in NAMES if n not in self.names())
        done = self.act(lambda e: verbs.create(e, new_vm(name, start=start)), plan, outside)
        assert done is None or done.vm_uuid in self.world.read().vms

    @precondition(lambda self: self.names())
    @rule(pick=picks, plan=deaths, outside=OUTSIDE)
    def start(self, pick: int, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick, State.OFF)
        done = self.act(lambda e: verbs.start(e, name), plan, outside)
        assert done is None or self.world.vm(name).state is State.RUNNING

    @precondition(lambda self: self.names())
    @rule(pick=picks, force=st.booleans(), plan=deaths, outside=OUTSIDE)
    def stop(self, pick: int, force: bool, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick, State.RUNNING, State.PAUSED)
        done = self.act(lambda e: verbs.stop(e, name, force=force, seconds=0.0), plan, outside)
        assert done is None or self.world.vm(name).state is State.OFF

    @precondition(lambda self: self.names())
    @rule(pick=picks, force=st.booleans(), plan=deaths, outside=OUTSIDE)
    def delete(self, pick: int, force: bool, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick, State.OFF)
        done = self.act(lambda e: verbs.delete(e, name, force=force), plan, outside)
        assert done is None or name not in {vm.name for vm in self.world.read().vms.values()}

    @precondition(lambda self: self.names())
    @rule(pick=picks, change=CHANGES, plan=deaths, outside=OUTSIDE)
    def allocate(self, pick: int, change: Change, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick, State.RUNNING)
        if not self.act(lambda e: allocate(e, name, change), plan, outside):
            return
        vm = self.world.vm(name)
        assert vm.record is not None
        assert (vm.allocation.memory, vm.record.allocation.memory) == (change.memory, change.memory)
        assert vm.allocation.cpu_quota == vm.record.allocation.cpu_quota == change.cpu_quota
        assert sum(vm.online) == change.vcpus or vm.state is not State.RUNNING
        assert self.store.record_of("fake", vm.uuid) == vm.record

    @precondition(lambda self: self.names())
    @rule(pick=picks, on=st.booleans(), plan=deaths, outside=OUTSIDE)
    def protect(self, pick: int, on: bool, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick)
        if self.act(lambda e: verbs.protect(e, name, on), plan, outside):
            record = self.world.vm(name).record
            assert record is not None
            assert record.protected is on

    @precondition(lambda self: self.names())
    @rule(pick=picks, snapshot=SNAPSHOTS, plan=deaths, outside=OUTSIDE)
    def take(self, pick: int, snapshot: str, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.one(pick, State.RUNNING, State.PAUSED)
        taken = {s.name for s in self.engine.host.machine.snapshots(self.world.vm(name).uuid)}
        snapshot = next((s for s in (snapshot, "t", "u", "v") if s not in taken), snapshot)
        done = self.keeps(name, lambda: self.act(lambda e: snapshots.take(e, name, snapshot), plan, outside))
        assert done is None or snapshot in {s.name for s in self.engine.host.machine.snapshots(done.vm_uuid)}

    @precondition(lambda self: self.engine.host.machine.snapshots())
    @rule(pick=picks, snapshot=SNAPSHOTS, plan=deaths, outside=OUTSIDE)
    def reset(self, pick: int, snapshot: str, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.with_snapshots(pick)
        ids = {s.name: s.id for s in self.engine.host.machine.snapshots(self.world.vm(name).uuid)}
        snapshot = snapshot if snapshot in ids or not ids else next(iter(ids))
        if self.world.vm(name).state is State.RUNNING:
            self.world.spoil(name)
        if self.act(lambda e: snapshots.reset(e, name, snapshot), plan, outside):
            assert self.world.content(name) == self.stored[ids[snapshot]]

    @precondition(lambda self: self.engine.host.machine.snapshots())
    @rule(pick=picks, snapshot=SNAPSHOTS, scope=PARTS, audit=st.booleans(), plan=deaths, outside=OUTSIDE)
    def reset_parts(
        self, pick: int, snapshot: str, scope: Scope, audit: bool, plan: list[tuple[int, str]], outside: str | None
    ) -> None:
        """What is named is as in the snapshot, all else as before; half done and recovered, it is one or the other."""
        name = self.with_snapshots(pick)
        ids = {s.name: s.id for s in self.engine.host.machine.snapshots(self.world.vm(name).uuid)}
        snapshot = snapshot if snapshot in ids or not ids else next(iter(ids))
        if self.world.vm(name).state is State.RUNNING:
            self.world.spoil(name)
        before, process = self.world.content(name), self.world.vm(name).process
        wishes = replace(AS_USUAL, audit=audit, accept_incoherent=True)
        done = self.act(lambda e: snapshots.reset(e, name, snapshot, scope, wishes), plan, outside)
        if outside or name not in self.names() or self.world.vm(name).process != process:
            return
        back = {"ram": scope.ram, "devices": scope.devices, "vda": bool(scope.disks)}
        wanted = {p: self.stored[ids[snapshot]][p] if back[p] else before[p] for p in before} if ids else before
        quarantined = self.store.operations("fake", self.world.vm(name).uuid, OpState.QUARANTINED)
        assert self.world.content(name) == wanted or (
            done is None and (self.world.content(name) == before or quarantined)
        )

    @precondition(lambda self: self.engine.host.machine.snapshots())
    @rule(pick=picks, snapshot=SNAPSHOTS, plan=deaths, outside=OUTSIDE)
    def drop(self, pick: int, snapshot: str, plan: list[tuple[int, str]], outside: str | None) -> None:
        name = self.with_snapshots(pick)
        taken = [s.name for s in self.engine.host.machine.snapshots(self.world.vm(name).uuid)]
        snapshot = snapshot if snapshot in taken or not taken else taken[0]
        done = self.act(lambda e: snapshots.delete(e, name, snapshot), plan, outside)
        assert done is None or snapshot not in {s.name for s in self.engine.host.machine.snapshots(done.vm_uuid)}

    # --- what others do

    @rule(what=OUTSIDE.filter(lambda what: what is not None))
    def somebody(self, what: str) -> None:
        self.others(what)

    @rule(floor=st.sampled_from((0, 200 * MIB)), keeps=st.booleans(), agent=st.sampled_from(("present", "absent")))
    def guests_differ(self, floor: int, keeps: bool, agent: str) -> None:
        for vm in self.world.read().vms.values():
            self.world.set_behaviour(vm.name, balloon_floor=floor, keeps_vcpus=keeps, agent=agent)

    @rule()
    def libvirt_is_away(self) -> None:
        promises = self.store.promises("fake")
        self.world.set_libvirt_down(True)
        assert self.engine.sweep() == []
        assert self.store.promises("fake") == promises
        self.world.set_libvirt_down(False)

    # --- the contract

    @invariant()
    def nothing_is_open_or_locked(self) -> None:
        assert self.store.open_operations("fake") == ()
        for vm in self.world.read().vms:
            assert free(self.settings.locks_dir, vm)

    @invariant()
    def no_torn_guest_ran(self) -> None:
        torn = {vm.uuid for vm in self.world.read().vms.values() if vm.torn}
        assert torn <= self.torn_by_others

    @invariant()
    def nobody_is_left_paused(self) -> None:
        """Only by whoever paused it, or because its memory is mixed."""
        for vm in self.world.read().vms.values():
            if vm.state is State.PAUSED and vm.uuid not in self.paused_by_others:
                assert self.store.operations("fake", vm.uuid, OpState.QUARANTINED), vm.name

    @invariant()
    def promises_fit_the_host(self) -> None:
        held = holders(self.store.ledger("fake"), observe_all(self.engine.host))
        total = sum((resources for _, resources in held.values()), Resources())
        capacity = capacity_of(self.engine.facts, self.settings)
        assert total.memory <= capacity.memory
        assert total.cpu <= capacity.cpu

    @invariant()
    def nothing_is_leaked(self) -> None:
        world = self.world.read()
        published = self.engine.host.machine.snapshots()
        kept = self.engine.host.machine.snapshots(hidden=True)
        assert {s.id for s in kept if s.hidden} <= {s.parent for s in kept}, "kept for nobody"
        disks = {d.path for vm in world.vms.values() for d in vm.disks}
        for path, file in world.files.items():
            assert path in disks or any(path.startswith(s.folder) for s in kept), f"leaked {path}"
            assert self.rebooted or set(file.tags) <= {s.tag for s in published}, f"leaked tags in {path}"
        for vm in world.vms.values():
            assert set(vm.nodes) <= {s.vmstate_node for s in published}, "leaked block nodes"
        assert {ifb.owner for ifb in world.ifbs.values()} <= set(world.vms)
        assert set(world.folders) <= set(world.vms)

    @invariant()
    def promises_are_of_vms_that_are(self) -> None:
        world = self.world.read()
        assert {p.vm_uuid for p in self.store.promises("fake")} == set(world.vms)


def test_the_contract_holds_through_any_life(migrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "ONLINE_SECONDS", 0.0)
    monkeypatch.setattr(hands, "AGENT_SECONDS", 0.0)
    monkeypatch.setattr("hvctl.decide.reset.AGENT_SECONDS", 0.0)
    Life.template = migrated
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=100,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
