"""A guard on a fake host: what it sees, what it does by the verbs of operators, what it writes down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from faults.command import FakeSite

from hvctl.adapters.fake import open_fake
from hvctl.adapters.fake.state import Used
from hvctl.adapters.store.store import Store
from hvctl.cli import decision
from hvctl.decide.growth import FULL as FULL_SHARE
from hvctl.decide.growth import growth
from hvctl.decide.guard import decide
from hvctl.decide.scope import parse_scope
from hvctl.engine.handover import capacity
from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.errors import HvctlError, NotFoundError, RefusedError, UsageError
from hvctl.model.allocation import Change, DiskChange, DiskLimit, NicChange, NicLimit
from hvctl.model.forecast import Answerer
from hvctl.model.guard import Allowed, Decided, GuardPolicy, Verdict, Watch
from hvctl.model.operation import Kind, OpState
from hvctl.model.pool import Rung
from hvctl.model.prediction import Prediction
from hvctl.model.sample import Sample
from hvctl.operations import guard, guardact, guardpolicy, interrupt, snapshot, why
from hvctl.operations import vm as vms
from hvctl.operations.allocate import allocate
from hvctl.settings import Settings
from unit.enginehost import MIB, add_image, last, new_vm

UMOUNT, MOUNT = ("umount", "vda"), ("mount", "vda")
SCRATCH = Allowed("disk:data", 0.0, before=(UMOUNT,), after=(MOUNT,))
FULL = 64 * MIB


def watch(*allow: Allowed | str, **more: object) -> Watch:
    parts = tuple(a if isinstance(a, Allowed) else Allowed(a, 0.0) for a in allow)
    wanted = {"to": "clean", "looks": 1, "threshold": 10.0, "horizon": 600.0, "window": 300.0, "cool_down": 60.0} | more
    return Watch("of a test", GuardPolicy("of a test", parts, **wanted))  # type: ignore[arg-type]


@dataclass
class Node:
    """One VM that runs on a fake host whose time is what the test says."""

    site: FakeSite
    engine: Engine
    uuid: str
    now: float = 10_000.0

    def later(self, seconds: float = 10.0) -> None:
        self.now += seconds

    def measure(self, *, rss: float = 100.0, used: float = 50.0, cache: float = 20.0, **more: float) -> None:
        """What a cycle of the collector found, and the VM is so still; in MiB. more: CPU, reads, connections. Time goes
        on."""
        self.later()
        world, taken, held = self.site.world, round(used * MIB), round(cache * MIB)
        world.set_used("a", Used(resident=round(rss * MIB)))
        world.set_behaviour("a", used_memory=taken, cache=held)
        has = self.engine.host.domains.get("a").allocation.memory
        sample = Sample(
            self.uuid, "a", int(self.now), 10.0, cpu=more.get("cpu", 0.1), memory=has, memory_used=taken,
            memory_available=has, memory_usable=has - taken, memory_unused=has - taken - held, rss=rss * MIB,
            disk_reads=more.get("reads", 0.0), disk_writes=0.0, connections=more.get("connections"),
        )  # fmt: skip
        self.engine.store.samples.add(self.engine.facts.name, [sample])

    def disk(self, taken: int) -> None:
        """The guest wrote to its disk."""
        self.later()
        with self.site.world._file.change() as world:
            disk = world.vm("a").disks[0]
            world.files[str(disk.path)].part.size = taken
            world.files[str(disk.path)].most = FULL

    def leak(self) -> None:
        """Page cache up to what the host can still see grow."""
        for i in range(6):
            self.measure(rss=100.0 + 10 * i, cache=10.0 + 10 * i)

    def fill(self, *taken: int) -> Decided:
        """The guest fills its disk, with a look at each size in MiB; the last decision."""
        for size in taken:
            self.disk(size * MIB)
            made = self.cycle()
        return made

    def arm(self, rules: Watch) -> None:
        guard.arm(self.engine, "a", rules)

    def cycle(self) -> Decided:
        """A look at the VM, and the decision."""
        guard.cycle(self.engine)
        return self.newest()

    def newest(self) -> Decided:
        return self.decisions()[0]

    def decisions(self) -> list[Decided]:
        return self.engine.store.guards.of_vm(self.engine.facts.name, self.uuid)

    def kinds(self) -> list[Kind]:
        return [o.kind for o in self.engine.store.operations(self.engine.facts.name)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    site = FakeSite(tmp_path)
    add_image(site)
    with Store(site.settings.database) as store:
        store.migrate()
        engine = Engine(site.settings, open_fake(site.world.uri), store)
        vms.create(engine, new_vm("a"))
        snapshot.take(engine, "a", "clean")
        made = Node(site, engine, engine.host.domains.uuid("a"))
        engine.clock = lambda: made.now
        yield made


def test_a_page_cache_that_leaks_goes_back_before_the_limit(node: Node) -> None:
    node.arm(watch("cache", resident=256 * MIB))
    node.leak()
    made = node.cycle()
    assert made.decision.chosen is not None
    assert (made.decision.chosen.part, made.outcome) == ("cache", "done")
    done = last(node.engine)
    assert (done.id, done.kind, done.state) == (made.operation, Kind.RESET, OpState.DONE)
    assert "drop_caches" in node.site.world.vm("a").executed[-1]
    node.leak()
    node.now = made.at + 59.0
    assert node.cycle().decision.verdict is Verdict.COOLING
    assert why.explained(node.site.settings, str(done.id)).decision == made
    assert why.explained(node.site.settings, f"d{made.id}").operation == done


def test_a_disk_that_fills_is_emptied_with_the_guests_help(node: Node) -> None:
    node.site.world.set_behaviour("a", mounted=["vda"])
    node.arm(watch(SCRATCH))
    made = node.fill(20, 30, 40)
    assert made.decision.chosen is not None, made.decision
    assert made.outcome == "done"
    assert node.site.world.vm("a").executed[-2:] == ["umount vda", "mount vda"]
    space = node.engine.host.storage.space(node.engine.host.domains.get("a").disks[0])
    assert space.taken == 0
    node.later()
    assert node.cycle().decision.verdict is Verdict.QUIET


def test_a_disk_of_which_the_guest_says_that_it_is_empty_is_left_alone(node: Node) -> None:
    system = {"name": "vda", "disk": [{"dev": "/dev/vda"}], "used-bytes": 1 * MIB, "total-bytes": FULL}
    node.site.world.set_behaviour("a", answers={"guest-get-fsinfo": [system]})
    node.arm(watch(SCRATCH))
    made = node.fill(10, 20, 30, 40)
    assert made.decision.verdict is Verdict.QUIET
    assert node.kinds()[0] is Kind.SET


def test_memory_grows_where_guest_and_host_say_so_and_only_as_far_as_the_host_has_room(node: Node) -> None:
    node.arm(watch("grow"))
    for i in range(6):
        node.measure(rss=150.0 + 10 * i, used=150.0 + 10 * i, cache=0.0)
    made = node.cycle()
    assert made.decision.chosen is not None
    assert made.decision.chosen.name == "grow:memory"
    assert node.engine.host.domains.get("a").allocation.memory == 312 * MIB
    node.engine.settings = replace(node.engine.settings, reserve_memory=node.engine.facts.memory - 312 * MIB)
    for i in range(7):
        node.measure(rss=220.0 + 10 * i, used=220.0 + 10 * i, cache=0.0)
    full = node.cycle()
    assert full.decision.verdict is Verdict.UNABLE
    assert {a.refused for a in full.decision.alternatives if a.name == "grow:memory"} == {"it cannot have more"}


def test_a_guest_that_claims_memory_which_the_host_does_not_see_gets_none(node: Node) -> None:
    node.arm(watch("grow"))
    for i in range(6):
        node.measure(rss=100.0, used=150.0 + 10 * i, cache=0.0)
    assert node.cycle().decision.verdict is Verdict.QUIET


def test_cpu_grows_by_the_quota_that_holds_it(node: Node) -> None:
    allocate(node.engine, "a", Change(cpu_quota=50))
    node.arm(watch("grow"))
    for _ in range(4):
        node.measure(cpu=0.5)
    made = node.cycle()
    assert made.decision.chosen is not None
    assert made.decision.chosen.name == "grow:cpu"
    assert node.engine.host.domains.get("a").allocation.cpu_quota == 63


def neighbours(node: Node, *names: str, **cpu: float) -> None:
    """More guarded VMs like a, each with half a core, and samples of a time when they took so much of it."""
    for name in names:
        vms.create(node.engine, new_vm(name))
    for name in ("a", *names):
        allocate(node.engine, name, Change(cpu_quota=50))
        guard.arm(node.engine, name, watch("grow"))
        uuid = node.engine.host.domains.uuid(name)
        samples = [Sample(uuid, name, int(node.now) + 10 * i, 10.0, cpu=cpu.get(name, 0.1)) for i in range(4)]
        node.engine.store.samples.add(node.engine.facts.name, samples)
    node.later(40.0)


def test_one_look_reads_what_is_promised_and_measured_once_for_all(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours(node, "b", "c")
    store, read = node.engine.store, list[str]()
    ledger, latest = store.ledger, store.samples.latest
    monkeypatch.setattr(store, "ledger", lambda *a: read.append("ledger") or ledger(*a))
    monkeypatch.setattr(store.samples, "latest", lambda *a: read.append("samples") or latest(*a))
    assert guard.cycle(node.engine) == "3 guarded; nothing was done"
    assert sorted(read) == ["ledger", "samples"]
    seen = {d.vm_name: d.facts.measures for d in store.guards.newest(node.engine.facts.name).values()}
    points = {name: next(m.points for m in measures if m.resource == "cpu") for name, measures in seen.items()}
    assert {name: len(p) for name, p in points.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_decision_sees_what_an_earlier_one_of_the_same_look_has_changed(node: Node) -> None:
    """Two that need more, on a host with room for one: the second one is told of what is left."""
    neighbours(node, "b", a=0.5, b=0.5)
    node.engine.settings = replace(node.engine.settings, cpu_overcommit=1.15 / 16)
    assert guard.cycle(node.engine).startswith("2 guarded; a: grow:cpu (done")
    assert node.engine.host.domains.get("a").allocation.cpu_quota == 63
    second = next(d for d in node.engine.store.guards.newest(node.engine.facts.name).values() if d.vm_name == "b")
    most = next(m.most for m in second.facts.measures if m.resource == "cpu")
    assert most == pytest.approx((capacity(node.engine).cpu - 63) / 100 * FULL_SHARE)


def test_it_grows_step_by_step_towards_what_is_forecast(node: Node) -> None:
    node.arm(watch("grow", horizon=1800.0))
    for _ in range(4):
        node.measure(cpu=0.5)
    soon = Prediction(
        int(node.now), node.uuid, "cpu", 3600, 0.95, 3.0, 1.0, "max_1h", Answerer.BASELINE.value, None, None, 3.0, 1.0
    )
    node.engine.store.forecasts.add(node.engine.facts.name, [soon])
    made = node.cycle()
    assert made.decision.chosen is not None
    assert made.decision.chosen.name == "grow:cpu"
    assert [o.by for o in made.decision.outlooks if o.resource == "cpu"] == ["forecast"]
    assert node.engine.host.domains.get("a").allocation.vcpus == 2
    for _ in range(6):
        node.measure(cpu=0.5)
    assert node.cycle().outcome == "done"
    assert node.engine.host.domains.get("a").allocation.vcpus == 3


def test_limits_of_disks_and_nics_grow_each_by_the_same_share(node: Node) -> None:
    vm = node.engine.host.domains.get("a")
    limits = replace(
        vm.allocation, disks=(DiskLimit("vda", 100, 10 * MIB), DiskLimit("vdb", 300)), nics=(NicLimit("m", 8_000_000),)
    )
    vm = replace(vm, allocation=limits)
    assert growth(vm, "iops", 500 * FULL_SHARE, 0).disks == (DiskChange("vda", 125), DiskChange("vdb", 375))
    assert growth(vm, "disk-rate", 20 * MIB * FULL_SHARE, 0).disks == (DiskChange("vda", rate=20 * MIB),)
    assert growth(vm, "net-in", 1e7 * FULL_SHARE, 0).nics == (NicChange("m", 10_000_000),)
    assert growth(vm, "cpu", 1.25 * FULL_SHARE, 0) == Change(vcpus=2)
    assert growth(vm, "memory", 300 * MIB, 32 * MIB) == Change(memory=332 * MIB)


def test_a_throttled_disk_gets_more(node: Node) -> None:
    allocate(node.engine, "a", Change(disks=(DiskChange(None, iops=100),)))
    node.arm(watch("grow"))
    for _ in range(4):
        node.measure(reads=99.0)
    made = node.cycle()
    assert made.decision.chosen is not None
    assert made.decision.chosen.name == "grow:iops"
    assert node.engine.host.domains.get("a").allocation.disk("vda").iops == 125


def test_the_network_path_is_made_anew_before_the_host_tracks_too_much_of_it(node: Node) -> None:
    node.arm(watch("net", connections=1000))
    for connections in (600.0, 700.0, 800.0, 900.0):
        node.measure(connections=connections)
    made = node.cycle()
    assert made.decision.chosen is not None
    assert (made.decision.chosen.part, made.outcome) == ("net", "done")
    assert [s.name for s in last(node.engine).steps] == ["drop_queues", "forget_flows", "set_nic_limit"]


def test_the_whole_vm_goes_back_where_nothing_less_helps(node: Node) -> None:
    node.arm(watch("whole"))
    node.site.world.spoil("a")
    made = node.fill(20, 30, 40)
    assert made.outcome == "done"
    assert (last(node.engine).kind, last(node.engine).request["to"]) == (Kind.RESET, "clean")
    assert node.engine.host.storage.space(node.engine.host.domains.get("a").disks[0]).taken == 0
    assert guard.guarded(node.engine)[0].watch.policy.to == "clean", "it is guarded still"


def test_work_that_is_lost_is_that_since_the_last_reset(node: Node) -> None:
    node.now = time.time() + 500.0
    node.arm(watch(Allowed("disk:data", 1.0), threshold=1000.0))
    before = node.fill(20, 30, 40).facts.costs["disk:data"]
    assert 500.0 < before.work < 700.0
    assert before.measured == 0
    snapshot.reset(node.engine, "a", "clean", parse_scope(["disk:data"]))
    after = node.fill(50).facts.costs["disk:data"]
    assert after.work > 500.0, "by the clock of the journal, which the test's is ahead of"
    assert after.measured == 1
    assert after.pause < 1.0


def test_who_is_interrupted_is_left_alone(node: Node) -> None:
    vms.configure(node.engine, "a", interruptible=True)
    node.arm(watch("grow", "cache", resident=256 * MIB))
    for rss in range(150, 210, 10):
        node.measure(rss=float(rss), used=float(rss), cache=0.0)
    interrupt.vms(node.engine, ["a"], Rung.SQUEEZE, back=3600.0, grace=0.1, reason="a test")
    made = node.cycle()
    assert made.decision.verdict is Verdict.UNABLE
    assert {a.refused for a in made.decision.alternatives} == {"a is interrupted"}


def test_what_its_verb_would_refuse_is_no_choice(node: Node) -> None:
    """The guest has the disk in use, and the policy has no hooks that would have it let go."""
    node.site.world.set_behaviour("a", mounted=["vda"])
    node.arm(watch(Allowed("disk:data", 0.0)))
    made = node.fill(10, 20, 30, 40)
    assert made.decision.verdict is Verdict.UNABLE
    assert "incoherent" in str([a.refused for a in made.decision.alternatives])


@pytest.mark.parametrize("why_not", ["protected", "no snapshot", "paused"])
def test_what_cannot_be_done_is_said(node: Node, why_not: str) -> None:
    node.arm(watch(SCRATCH, to="other" if why_not == "no snapshot" else "clean"))
    if why_not == "protected":
        vms.protect(node.engine, "a", on=True)
    if why_not == "paused":
        node.site.world.pause("a")
    made = node.fill(10, 20, 30, 58)
    assert made.decision.verdict is Verdict.UNABLE
    assert why_not in str(made.decision.alternatives[0].refused)


def test_what_is_reset_is_kept_before_and_comes_back(node: Node) -> None:
    node.arm(watch(SCRATCH, snapshot_first=True, keep=100.0))
    made = node.fill(20, 30, 40)
    assert made.kept_until == node.now + 100.0
    assert [s.name for s in node.engine.host.machine.snapshots(node.uuid)] == ["clean", made.kept]
    guardact.undo(node.engine, "a")
    disk = node.engine.host.domains.get("a").disks[0]
    assert node.engine.host.storage.space(disk).taken == 40 * MIB
    node.later()
    assert node.cycle().decision.verdict in (Verdict.COOLING, Verdict.QUIET), "it does not do the same at once"
    node.now = made.at + 99.0
    node.cycle()
    assert [s.name for s in node.engine.host.machine.snapshots(node.uuid)] == ["clean", made.kept], "until its time"
    node.later(100.0)
    with pytest.raises(RefusedError, match="nothing that a guard reset"):
        guardact.undo(node.engine, "a")
    node.cycle()
    assert [s.name for s in node.engine.host.machine.snapshots(node.uuid)] == ["clean"]


def test_what_it_costs_to_keep_it_is_learned_from_earlier_snapshots_and_explained(node: Node) -> None:
    node.arm(watch(SCRATCH, snapshot_first=True, keep=100.0))
    made = node.fill(20, 30, 40)
    (take,) = (o for o in node.engine.store.operations(node.engine.facts.name) if o.request.get("name") == "clean")
    cost = made.facts.costs["disk:data"]
    assert take.result is not None
    assert (cost.take, cost.taken) == (pytest.approx(take.result["paused"]), 1), "that of the one it goes back to"
    (only,) = made.decision.alternatives
    assert only.cost == pytest.approx(cost.pause + take.result["paused"])
    explained = why.explained(node.site.settings, f"d{made.id}").decision
    assert explained is not None
    assert any("pause for a snapshot first" in text for word, text in decision.lines(explained) if word == "chosen")
    node.later(100.0)
    assert node.fill(50).facts.costs["disk:data"].taken == 2, "and from its own"


def test_what_became_of_an_action_is_said_when_its_operation_has_ended(node: Node) -> None:
    node.arm(watch("cache", resident=256 * MIB))
    node.leak()
    node.site.world.fail("set_balloon", "DeadlineError")
    one = node.cycle()
    assert one.decision.chosen is not None
    assert (one.outcome, guardact.settle(node.engine), node.newest().outcome) == (None, 0, None)
    (ended,) = node.engine.sweep()
    assert guardact.settle(node.engine) == 1
    assert (node.newest().operation, str(node.newest().outcome).split(":")[0]) == (ended.id, ended.state)


def test_many_looks_at_nothing_are_one_row_an_hour(node: Node) -> None:
    node.arm(watch("cache"))
    for _ in range(30):
        node.measure()
        node.cycle()
    assert [(d.looks, d.until - d.at) for d in node.decisions()] == [(30, 290.0)]
    node.later(3600.0)
    node.measure()
    node.cycle()
    assert [d.looks for d in node.decisions()] == [1, 30]


def test_the_worst_look_of_a_run_is_not_lost_in_it(node: Node) -> None:
    node.arm(watch("cache", threshold=10_000.0, resident=150 * MIB, horizon=600.0))
    for rss in (100, 105, 110, 115, 130, 140, 100, 100, 100, 100):
        node.measure(rss=float(rss))
        node.cycle()
    made = node.newest()
    assert made.looks > 3
    assert made.most > made.decision.contention
    assert made.at < made.most_at < made.until


def test_a_decision_is_decided_the_same_from_what_the_journal_has(node: Node) -> None:
    node.arm(watch("cache", "grow", resident=256 * MIB))
    node.leak()
    made = node.cycle()
    again = decide(made.facts, made.watch.policy, made.before)
    assert again == made.decision


def test_whoever_has_the_vm_is_not_disturbed_and_it_is_tried_again(node: Node) -> None:
    node.engine.settings = replace(node.engine.settings, lock_wait=0.0)
    node.arm(watch("cache", resident=256 * MIB))
    node.leak()
    with vm_lock(node.site.settings.locks_dir, node.uuid, 0.0):
        busy = node.cycle()
    assert (busy.outcome or "").startswith("not begun")
    node.later(1.0)
    assert node.cycle().outcome == "done"


def test_a_kept_snapshot_that_cannot_go_now_holds_up_nobody(node: Node) -> None:
    node.engine.settings = replace(node.engine.settings, lock_wait=0.0)
    node.arm(watch(SCRATCH, snapshot_first=True, keep=100.0))
    kept = node.fill(20, 30, 40).kept
    before = len(node.decisions())
    node.later(100.0)
    with vm_lock(node.site.settings.locks_dir, node.uuid, 0.0), pytest.raises(HvctlError, match="still there"):
        node.cycle()
    assert len(node.decisions()) > before
    assert kept in [s.name for s in node.engine.host.machine.snapshots(node.uuid)]
    node.later(1.0)
    node.cycle()
    assert [s.name for s in node.engine.host.machine.snapshots(node.uuid)] == ["clean"]


def test_a_kept_snapshot_that_an_operator_deleted_is_looked_for_once(node: Node) -> None:
    node.arm(watch(SCRATCH, snapshot_first=True, keep=100.0))
    snapshot.delete(node.engine, "a", node.fill(20, 30, 40).kept)
    assert len(node.engine.store.guards.kept(node.engine.facts.name)) == 1
    node.later(100.0)
    node.cycle()
    assert node.engine.store.guards.kept(node.engine.facts.name) == []


def test_an_action_that_fails_is_not_tried_again_at_once(node: Node) -> None:
    node.arm(watch("cache", resident=256 * MIB))
    node.leak()
    node.site.world.set_behaviour("a", refuses=["guest-exec"])
    failed = node.cycle()
    assert (failed.outcome or "").startswith("failed: ")
    assert failed.operation is not None
    node.leak()
    node.now = failed.at + 59.0
    assert node.cycle().decision.verdict is Verdict.COOLING


def test_dry_run_decides_and_writes_nothing(node: Node) -> None:
    node.leak()
    told = guard.preview(node.engine, "a", watch("cache", resident=256 * MIB))
    assert told.decision.chosen is not None
    assert (node.decisions(), node.kinds()) == ([], [Kind.SNAPSHOT_TAKE, Kind.CREATE])


def test_off_is_off_and_forgets(node: Node) -> None:
    node.arm(watch("cache", resident=256 * MIB))
    node.leak()
    node.cycle()
    guard.arm(node.engine, "a", None)
    assert node.engine.store.guards.state(node.engine.facts.name, node.uuid).memory.acted_at is None
    assert guard.cycle(node.engine) == "nobody is guarded"
    assert guard.guarded(node.engine) == []


def test_a_policy_in_a_record_that_somebody_broke_acts_on_nothing(node: Node) -> None:
    node.arm(watch("cache", resident=256 * MIB))
    with node.site.world._file.change() as world:
        record = world.vm("a").record
        assert record is not None
        assert record.guard is not None
        world.vm("a").record = replace(record, guard=replace(record.guard, policy=watch("everything").policy))
    node.leak()
    with pytest.raises(HvctlError, match="does not work"):
        guard.cycle(node.engine)
    assert node.decisions() == []


# --- policies


def test_the_shipped_policies_can_be_read() -> None:
    found = {name: guardpolicy.load(name) for name in guardpolicy.shipped()}
    assert set(found) == {"careful", "ci-scratch"}
    assert found["ci-scratch"].policy.cool_down == 120.0
    assert not any(a.act.needs_snapshot for a in found["careful"].policy.allow)


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ('description = "x"\nfoo = 1\n', UsageError, "'foo'"),
        ('description = "x"\n[[allow]]\npart = "cache"\nbar = 1\n', UsageError, "'bar'"),
        ('description = "x"\nthreshold = 5\n[[allow]]\npart = "cache"\n', UsageError, "no unit"),
        ('description = "x"\nresident = "5"\n[[allow]]\npart = "cache"\n', UsageError, "no unit"),
        ('description = "x"\n', UsageError, "not one"),
        ('description = "x"\n[[allow]]\npart = "everything"\n', UsageError, "everything"),
        ("=", UsageError, "cannot be read"),
        (None, NotFoundError, "ci-scratch"),
    ],
)
def test_a_policy_file_that_says_something_wrong_is_refused_with_a_hint(
    tmp_path: Path, text: str | None, error: type[HvctlError], word: str
) -> None:
    file = tmp_path / "policy.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error) as caught:
        guardpolicy.load(str(file))
    assert word in caught.value.message + str(caught.value.hint)


def test_nothing_is_explained_that_has_no_number(tmp_path: Path) -> None:
    settings = Settings(state_dir=str(tmp_path))
    with pytest.raises(UsageError, match="no number"):
        why.explained(settings, "guard")
    with pytest.raises(NotFoundError, match="d7"):
        why.explained(settings, "d7")
