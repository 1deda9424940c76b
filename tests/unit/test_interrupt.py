"""Demands, interruptions and returns through the engine on a fake host with little room; after every step of every
operation what is promised and reserved fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.adapters.fake.state import Exec
from hvctl.engine.awayhands import away_hand
from hvctl.engine.faults import Faults
from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, NotFoundError, NotUndoneError, RefusedError
from hvctl.model.allocation import Allocation, Change, DiskChange, Record, Resources
from hvctl.model.awaysteps import SaveGuest
from hvctl.model.operation import OpState, Outcome
from hvctl.model.pool import Held, Limits, Need, Rung
from hvctl.model.sample import EventKind, Sample, VmEvent
from hvctl.model.vm import State
from hvctl.operations import comeback, demand, interrupt, pool, restarts
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from hvctl.operations.journal import recover
from unit.commandline import Run, runner
from unit.enginehost import add_image, new_vm
from unit.poolhost import HOUR, MIB, add, ask, gone, journal, reserved, saves, small


@pytest.fixture
def run(site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(site, monkeypatch, capsys)


def steps(outcome: Outcome) -> list[str]:
    return [s.name for s in outcome.steps]


def test_a_demand_gets_what_its_victim_had_and_the_victim_comes_back(site: FakeSite) -> None:
    uuid = add(site, "spot", priority=100)
    add(site, "dear", priority=900)
    before = site.world.content("spot")
    with small(site, 1024) as engine:
        report = interrupt.for_need(engine, saves(400))
        assert report.demand is not None
        assert (report.demand.state, report.demand.granted.memory) == (Held.HELD, 400 * MIB)
        assert site.world.vm("spot").state is State.OFF
        assert site.world.vm("dear").state is State.RUNNING
        assert gone(engine)["spot"].return_at == 1000.0 + HOUR
        assert reserved(engine)[uuid].size.memory == 512 * MIB
        assert not engine.store.promise_of(engine.facts.name, uuid).holds  # type: ignore[union-attr]
        assert "400 MiB" in site.world.vm("spot").executed[0] or site.world.vm("spot").executed
        with pytest.raises(RefusedError, match="its guest is saved"):
            verbs.start(engine, "spot")
        with pytest.raises(RefusedError, match="memory lacks"):
            comeback.resume(engine, ["spot"])
    with small(site, 1024, later=HOUR) as engine:
        (back,) = comeback.due(engine).outcomes
        assert steps(back)[0] == "start"
        assert gone(engine) == {}
        assert site.world.content("spot")["ram"] == before["ram"], "it goes on where it was"


def test_the_owner_starts_inside_its_reservation_and_nobody_else(site: FakeSite) -> None:
    add_image(site)
    add(site, "spot")
    with small(site, 700, ever=False) as engine:
        interrupt.for_need(engine, saves(600, owner="ci-9"))
        wanted = {"memory": 600 * MIB, "max_memory": 1024 * MIB, "bridges": ()}
        with pytest.raises(RefusedError, match="memory lacks"):
            verbs.create(engine, new_vm("thief", **wanted))
        verbs.create(engine, new_vm("ci-9", **wanted))
        assert site.world.vm("ci-9").state is State.RUNNING
    with small(site, 700, later=HOUR, checked=False) as engine:
        late = comeback.due(engine)
        assert late.outcomes == ()
        ((who, why),) = late.left
        assert who.vm_name == "spot"
        assert "memory lacks" in why
        verbs.stop(engine, "ci-9", force=True, seconds=1.0)
        assert len(comeback.due(engine).outcomes) == 1


def test_nobody_comes_back_before_its_time(site: FakeSite) -> None:
    add(site, "spot")
    with small(site, 512) as engine:
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=HOUR, grace=1.0, reason="a test")
        assert (comeback.due(engine).outcomes, set(gone(engine))) == ((), {"spot"})
        engine.clock = lambda: 1000.0 + HOUR
        assert [o.vm_name for o in comeback.due(engine).outcomes] == ["spot"]


def test_who_is_protected_is_not_made_interruptible(site: FakeSite) -> None:
    add(site, "kept", interruptible=False, protected=True)
    with small(site, 512) as engine:
        with pytest.raises(RefusedError, match="protected"):
            verbs.configure(engine, "kept", interruptible=True)
        verbs.configure(engine, "kept", priority=3)
        record = site.world.vm("kept").record
        assert record is not None
        assert (record.priority, record.interruptible) == (3, False)


def test_it_comes_back_with_what_was_predicted(site: FakeSite) -> None:
    add(site, "spot", vcpus=2)
    with small(site, 2048) as engine:
        peaks = {"cpu": 2.5, "memory": 800.0}
        engine.needs = lambda vm, gap: Need(Resources(300, 900 * MIB), f"seen {gap:g} s", known=True, peaks=peaks)
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=1.0, reason="a test")
        assert (gone(engine)["spot"].forecast, gone(engine)["spot"].predicted) == ("seen 60 s", peaks)
    with small(site, 2048, later=60.0) as engine:
        (back,) = comeback.due(engine).outcomes
        assert steps(back)[:3] == ["set_memory", "set_vcpus", "start"], "the definition, before it starts"
        now = site.world.vm("spot")
        assert (now.allocation.vcpus, now.allocation.memory) == (3, 900 * MIB)
        assert now.record is not None
        assert now.record.allocation.memory == 900 * MIB


def test_a_return_says_how_far_off_the_last_one_was(site: FakeSite, run: Run) -> None:
    uuid = add(site, "spot")
    with small(site, 2048) as engine:
        engine.needs = lambda vm, gap: Need(Resources(300, 900 * MIB), "seen", known=True, peaks={"cpu": 2.0})
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=0.0, reason="a test")
    with small(site, 2048, later=60.0) as engine:
        (back,) = comeback.due(engine).outcomes
        assert back.result["last_return"] == [], "nobody knows yet"
        host, store = engine.facts.name, engine.store.samples
        samples = [Sample(uuid, "spot", 1060 + n, 10.0, cpu=3.0) for n in range(10, 1810, 10)]
        store.add(host, samples, [VmEvent(uuid, "spot", EventKind.START, 1060.0)])
        said = restarts.learn(engine, 2861.0)
        assert "; spot needed cpu 3.00 of 2.00 cores predicted in the first 30min after its return" in said
        assert "5min" in said
    with small(site, 2048, later=2000.0) as engine:
        assert [(r["span"], r["ratio"]) for r in restarts.returns(engine)] == [(300, 1.5), (1800, 1.5)]
        assert restarts.returns(engine, "another") == []
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=0.0, reason="a test")
        (again,) = comeback.resume(engine, ["spot"]).outcomes
        assert "after its last return it needed cpu 3.00 of 2.00 cores predicted" in again.reasons
        assert [r["span"] for r in again.result["last_return"]] == [1800]
    with small(site, 2048, later=restarts.COMPARED + 2000.0) as engine:
        assert restarts.returns(engine) == [], "it is a week ago"
    assert run("resume", "--returned", "--due").status == 2
    assert run("resume", "--returned").out.split()[:2] == ["VM", "HOW"]


def test_a_cpu_demand_pauses_and_memory_stays_held(site: FakeSite) -> None:
    uuid = add(site, "spot", vcpus=4)
    with small(site, 1024) as engine:
        report = interrupt.for_need(engine, ask(cpu=1600, rungs=(Rung.PAUSE, Rung.SAVE)))
        assert site.world.vm("spot").state is State.PAUSED
        assert report.demand is not None
        assert report.demand.state is Held.HELD
        assert engine.store.promise_of(engine.facts.name, uuid).resources == Resources(memory=512 * MIB)  # type: ignore[union-attr]
    with small(site, 1024, later=HOUR) as engine:
        (back,) = comeback.due(engine).outcomes
        assert steps(back)[0] == "continue_guest"
        assert site.world.vm("spot").state is State.RUNNING
        assert engine.store.promise_of(engine.facts.name, uuid).resources == Resources(400, 512 * MIB)  # type: ignore[union-attr]


def io(engine: Engine, uuid: str, *rates: float) -> None:
    """Samples of the last seconds, the newest last."""
    now = int(engine.clock())
    samples = [Sample(uuid, uuid, now - 10 * n, 10.0, disk_reads=r, disk_writes=5.0) for n, r in enumerate(rates[::-1])]
    engine.store.samples.add(engine.facts.name, samples, [])


def limited(site: FakeSite, engine: Engine, name: str, limit: int, *rates: float, **record: Any) -> str:
    uuid = site.world.add_vm(name, nics=0, record=Record(Allocation(1, 256 * MIB), interruptible=True, **record))
    allocate(engine, name, Change(disks=(DiskChange(iops=limit),)))
    io(engine, uuid, *rates)
    return uuid


def test_a_qemu_that_hangs_does_not_hide_the_pool(site: FakeSite) -> None:
    with small(site, 2048) as engine:
        add(site, "hangs", used=100)
        add(site, "well", used=100)
        site.world.fail("balloon", "DeadlineError")
        used = {r["resource"]: r["used"] for r in pool.show(engine)}
        assert used["memory"] == (512 + 100) * MIB, "what does not answer is taken to use all that it has"


def test_iops_that_are_not_used_go_by_a_squeeze_and_the_others_by_a_pause(site: FakeSite) -> None:
    with small(site, 2048) as engine:
        pool.set_limits(engine, Limits(iops_capacity=1000))
        limited(site, engine, "busy", 500, 390.0, 395.0, priority=10)
        idle = limited(site, engine, "idle", 400, 95.0, 35.0, priority=500)
        used = {r["resource"]: r["used"] for r in pool.show(engine)}
        assert used["iops"] == 400 + 40, "the newest sample of each"
        report = interrupt.for_need(engine, ask(iops=300, owner="ci-9"))
        assert report.demand is not None
        assert (report.demand.state, report.demand.granted.iops) == (Held.HELD, 300)
        assert [a.rung for a in gone(engine).values()] == [Rung.SQUEEZE], "100 were free"
        assert site.world.vm("idle").allocation.disks[0].iops == 400 - 200
        assert site.world.vm("idle").allocation.cpu_quota is None
        with pytest.raises(RefusedError, match="cannot free iops 377 IOPS"):
            interrupt.for_need(engine, ask(iops=376 + 1, owner="x", rungs=(Rung.SQUEEZE,)))
        report = interrupt.for_need(engine, ask(iops=400, owner="ci-10"))
        assert gone(engine)["busy"].rung is Rung.PAUSE, "it uses what it has"
        assert site.world.vm("busy").state is State.PAUSED
    with small(site, 2048, later=2 * HOUR) as engine:
        assert comeback.due(engine).left == ()
        assert site.world.vm("idle").allocation.disks[0].iops == 400
        assert engine.store.promise_of(engine.facts.name, idle).resources.iops == 400  # type: ignore[union-attr]


def test_reserved_iops_that_are_used_do_not_decay(site: FakeSite) -> None:
    uuid = add(site, "a")
    with small(site, 2048) as engine:
        pool.set_limits(engine, Limits(iops_capacity=1000))
        pool.reserve(engine, pool.Wanted("a", "", Resources(iops=400), 1000.0, None, half_life=10.0))
    with small(site, 2048, later=1.0) as engine:
        io(engine, uuid, 95.0)
        pool.follow(engine)
    with small(site, 2048, later=100.0) as engine:
        (one,) = pool.reservations(engine)
        assert 100 <= one["kept"]["iops"] < 110
    with small(site, 2048, later=300.0) as engine:
        assert {r["resource"]: r["used"] for r in pool.show(engine)}["iops"] is None, "no sample of now"


def test_a_squeeze_takes_what_is_not_used_and_gives_it_back(site: FakeSite) -> None:
    add(site, "spot", used=100)
    with small(site, 512) as engine:
        interrupt.for_need(engine, ask(300))
        now = site.world.vm("spot")
        assert (now.state, now.allocation.memory, now.allocation.cpu_quota) == (State.RUNNING, 212 * MIB, None)
        assert now.record is not None
        assert now.record.allocation.memory == 212 * MIB, "no more than lacked"
    with small(site, 512, later=HOUR) as engine:
        comeback.due(engine)
        assert site.world.vm("spot").allocation.memory == 512 * MIB


def test_neighbours_shrink_first_and_get_theirs_again(site: FakeSite) -> None:
    add(site, "spot", priority=1)
    add(site, "near", interruptible=False, used=100)
    with small(site, 1024) as engine:
        report = interrupt.for_need(engine, saves(200, seconds=2 * HOUR))
        kinds = [o.kind for o in report.outcomes]
        assert kinds == ["allocate", "interrupt"], "who shrinks goes first"
        assert site.world.vm("near").allocation.memory == 312 * MIB
    with small(site, 1024, later=HOUR) as engine:
        back = comeback.due(engine)
        assert [o.kind for o in back.outcomes] == ["resume"]
        assert "a neighbour does not have its own again yet" in back.warnings[0]
    with small(site, 1024, later=2 * HOUR) as engine:
        back = comeback.due(engine)
        assert [o.kind for o in back.outcomes] == ["allocate"]
        assert site.world.vm("near").allocation.memory == 512 * MIB
        assert comeback.due(engine).outcomes == ()


def test_a_guest_without_an_agent_hears_the_line_and_has_its_time(site: FakeSite) -> None:
    add(site, "spot")
    site.world.set_behaviour("spot", agent="absent")
    with small(site, 512) as engine:
        (done,) = interrupt.vms(engine, ["spot"], Rung.PAUSE, back=HOUR, grace=0.1, reason="for \u00e9 or\nnobody")
        assert not any("not told" in w for w in done.warnings)
        told = next(s.facts for s in done.steps if s.name == "notify_guest")
        assert told == {"told": True, "by": ["line"], "ready": False}
        assert site.world.vm("spot").heard == [
            f"notice interruption pause 1970-01-01T00:16:40Z 1970-01-01T01:16:40Z {notice_id(site)} for ? or?nobody"
        ]
        comeback.resume(engine, ["spot"])
        assert [line.split()[1] for line in site.world.vm("spot").heard] == ["interruption", "returned"]


def notice_id(site: FakeSite) -> str:
    """That of the last line."""
    found = site.world.vm("spot").heard[-1].split()[5]
    assert re.fullmatch("[0-9a-f]{32}", found)
    return found


def pause_spot(engine: Engine, grace: float) -> tuple[float, dict[str, Any]]:
    """Seconds of the notice's step, and its facts."""
    (done,) = interrupt.vms(engine, ["spot"], Rung.PAUSE, back=HOUR, grace=grace, reason="a test")
    told = next(s for s in done.steps if s.name == "notify_guest")
    return told.seconds, told.facts


def test_a_guest_without_an_agent_says_on_its_port_that_it_is_ready(site: FakeSite) -> None:
    add(site, "spot")
    site.world.set_behaviour("spot", agent="absent", acknowledges=True)
    with small(site, 512) as engine:
        seconds, facts = pause_spot(engine, HOUR)
        assert facts == {"told": True, "by": ["line"], "ready": True}
        assert seconds < HOUR
        assert site.world.vm("spot").state is State.PAUSED


def test_a_word_for_an_earlier_interruption_does_not_count(site: FakeSite) -> None:
    add(site, "spot")
    site.world.set_behaviour("spot", agent="absent", acknowledges=True)
    with small(site, 512) as engine:
        pause_spot(engine, HOUR)
        earlier = notice_id(site)
        comeback.resume(engine, ["spot"])
        assert notice_id(site) == earlier, "one interruption, from its notice to the return"
        site.world.set_behaviour("spot", acknowledges=False)
        site.world.say("spot", f"ready {earlier}")
        engine.clock = lambda: 1001.0
        assert pause_spot(engine, 0.1)[1]["ready"] is False
        assert notice_id(site) != earlier


def test_a_guest_with_an_agent_is_heard_on_its_port_too(site: FakeSite) -> None:
    """Its file is asked for with the notice's id, and is not there; or the agent does not answer at all."""
    add(site, "spot")
    site.world.set_behaviour("spot", acknowledges=True)
    with small(site, 512) as engine:
        pause_spot(engine, HOUR)
        asked = site.world.vm("spot").executed[-1]
        assert asked.endswith(f" sh {notice_id(site)}")
        comeback.resume(engine, ["spot"])
        site.world.set_behaviour("spot", exec={asked: Exec(status=1)})
        assert pause_spot(engine, HOUR)[1] == {"told": True, "by": ["line", "document"], "ready": True}
        comeback.resume(engine, ["spot"])
        site.world.fail("hear", "GuestError", times=100)
        assert pause_spot(engine, 0.1)[1]["ready"] is False, "one that floods its port has its time"


def test_a_guest_without_the_port_has_the_document_alone(site: FakeSite) -> None:
    add(site, "spot")
    site.world.unplug_pulse("spot")
    with small(site, 512) as engine:
        (done,) = interrupt.vms(engine, ["spot"], Rung.PAUSE, back=HOUR, grace=1.0, reason="a test")
        assert next(s.facts for s in done.steps if s.name == "notify_guest")["by"] == ["document"]


def test_a_guest_that_ignores_everything_is_ended(site: FakeSite) -> None:
    add(site, "spot")
    site.world.set_behaviour("spot", ignores_shutdown=True, agent="silent", answers_pulse=False)
    with small(site, 512) as engine:
        (done,) = interrupt.vms(engine, ["spot"], Rung.SHUTDOWN, back=HOUR, grace=1.0, reason="a test")
        assert site.world.vm("spot").state is State.OFF
        assert any("was not told" in w for w in done.warnings)
        assert any("its process was ended" in w for w in done.warnings)


def test_a_guest_that_somebody_paused_meanwhile_is_not_saved(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would come back paused, and nobody would let it go on."""
    uuid = add(site, "spot")
    site.world.pause("spot")
    with small(site, 512) as engine:
        monkeypatch.setattr(engine.host.domains, "save", lambda _: pytest.fail("it was saved"))
        with pytest.raises(RefusedError, match="only a guest that runs"):
            away_hand(engine.host, SaveGuest(uuid))


def test_what_cannot_be_saved_stays_and_another_one_goes(site: FakeSite) -> None:
    cheap = add(site, "cheap", priority=1)
    add(site, "next", priority=900)
    site.world.fail("save", uuid=cheap)
    with small(site, 1024) as engine:
        report = interrupt.for_need(engine, saves(300))
        assert report.demand is not None
        assert report.demand.state is Held.HELD
        assert site.world.vm("cheap").state is State.RUNNING
        assert site.world.vm("next").state is State.OFF
        assert any("another victim" in w for w in report.warnings)
        assert [o.state for o in journal(engine, "interrupt")] == ["done", "undone"]


def test_when_nobody_is_left_the_demand_is_given_up_and_who_went_is_due(site: FakeSite) -> None:
    add(site, "one", priority=1)
    two = add(site, "two", priority=900)
    site.world.fail("save", uuid=two)
    with small(site, 1024) as engine:
        with pytest.raises(RefusedError, match="was given up"):
            interrupt.for_need(engine, saves(900))
        assert "new" not in reserved(engine)
        assert gone(engine)["one"].return_at == 1000.0
        assert [o.vm_name for o in comeback.due(engine).outcomes] == ["one"]


def test_a_demand_that_is_given_up_keeps_nothing_for_who_was_still_to_go(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = add(site, "one", priority=1)
    add(site, "two", priority=900)
    site.world.fail("save", uuid=one)
    monkeypatch.setattr(demand, "TRIES", 1)
    with small(site, 1024) as engine:
        with pytest.raises(RefusedError, match="was given up: its victims did not go, 1 times"):
            interrupt.for_need(engine, saves(300))
        assert (reserved(engine), gone(engine)) == ({}, {})


def test_nothing_is_handed_over_while_it_is_unknown_whether_the_victim_is_off(site: FakeSite) -> None:
    """The save overruns: it may happen yet. The room stays the victim's until somebody saw it off."""
    uuid = add(site, "spot")
    site.world.fail("save", "DeadlineError", after=True)
    with small(site, 512) as engine:
        with pytest.raises(NotUndoneError, match="unknown"):
            interrupt.for_need(engine, saves(300))
        assert reserved(engine)["new"].granted.memory == 0
        assert engine.store.promise_of(engine.facts.name, uuid) is None
        with pytest.raises(RefusedError):
            pool.reserve(engine, pool.Wanted("thief", "", Resources(memory=1 * MIB), 1000.0, None))
        recover(engine)
        assert reserved(engine)["new"].state is Held.HELD
        assert len(journal(engine, "interrupt")) == 1, "nobody is interrupted twice for one demand"


def test_nothing_is_handed_over_while_the_victim_is_seen_to_run(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt says that it is saved, and it is not off: somebody may have started it again."""
    add(site, "spot")
    with small(site, 512) as engine:
        monkeypatch.setattr(engine.host.domains, "save", lambda uuid: None)
        with pytest.raises(NotUndoneError, match="running after it was ended"):
            interrupt.for_need(engine, saves(300))
        assert reserved(engine)["new"].granted.memory == 0
        assert [(o.vm_name, o.state) for o in journal(engine, "interrupt")] == [("spot", OpState.OPEN)]


def test_a_delayed_demand_begins_when_its_time_has_come(site: FakeSite) -> None:
    add(site, "spot", used=400)
    with small(site, 1112) as engine:
        pool.reserve(engine, pool.Wanted("other", "", Resources(memory=500 * MIB), 1000.0, 1000.0 + 2 * HOUR))
        report = interrupt.for_need(engine, saves(300, seconds=4 * HOUR))
        assert report.scheduled
        assert site.world.vm("spot").state is State.RUNNING
        assert interrupt.due(engine) == []
        hurried = interrupt.for_need(engine, saves(300, seconds=4 * HOUR, until=1000.0), dry_run=True)
        assert hurried.plan is not None
        assert hurried.plan.given_up
    with small(site, 1112, later=HOUR) as engine:
        (would,) = interrupt.due(engine, dry_run=True)
        assert would.demand is None
        assert site.world.vm("spot").state is State.RUNNING
        (begun,) = interrupt.due(engine)
        assert begun.demand is not None
        assert begun.demand.state is Held.HELD
        assert site.world.vm("spot").state is State.OFF
        assert interrupt.due(engine) == []


@pytest.mark.parametrize(("memory", "victims"), [(400, 1), (900, 2)])
def test_a_request_with_the_same_key_is_the_same_demand(site: FakeSite, memory: int, victims: int) -> None:
    """Also where nobody is left who could go for it."""
    add(site, "one")
    add(site, "two")
    with small(site, 1024) as engine:
        first, again = (interrupt.for_need(engine, saves(memory), key="k") for _ in range(2))
        assert first.demand is not None
        assert again.demand is not None
        assert first.demand.id == again.demand.id
        assert len(gone(engine)) == victims


def test_a_key_of_another_demand_is_refused(site: FakeSite) -> None:
    add(site, "one")
    wanted = pool.Wanted("ci-9", "", Resources(memory=100 * MIB), 1000.0, None)
    with small(site, 1024) as engine:
        interrupt.for_need(engine, saves(400), key="k")
        with pytest.raises(RefusedError, match="this key was used for reservation 1 of new: 400 MiB"):
            interrupt.for_need(engine, saves(200), key="k")
        pool.reserve(engine, wanted, key="r")
        assert pool.reserve(engine, wanted, key="r").id == pool.reserve(engine, wanted, key="r").id
        with pytest.raises(RefusedError, match="this key was used for reservation"):
            pool.reserve(engine, replace(wanted, size=Resources(memory=90 * MIB)), key="r")


def test_a_repeated_interruption_keeps_no_room_twice_and_a_repeated_return_is_answered(site: FakeSite) -> None:
    add(site, "one")
    with small(site, 2048) as engine:
        first, again = (
            interrupt.vms(engine, ["one"], Rung.PAUSE, back=60.0, grace=1.0, reason="", key="k") for _ in range(2)
        )
        assert (again[0].operation, again[0].plan) == (first[0].operation, ())
        assert len(engine.store.pool.reservations(engine.facts.name)) == 1
        back, told = (comeback.resume(engine, ["one"], key="b").outcomes[0] for _ in range(2))
        assert (told.operation, told.plan) == (back.operation, ())
        assert engine.store.pool.reservations(engine.facts.name) == ()
        with pytest.raises(NotFoundError, match="one is not away"):
            comeback.resume(engine, ["one"], key="another")


def test_nobody_is_interrupted_when_one_of_them_cannot_be(site: FakeSite) -> None:
    add(site, "one")
    add(site, "firm", interruptible=False)
    with small(site, 2048) as engine:
        for others in (["firm"], ["nosuch"]):
            with pytest.raises((RefusedError, NotFoundError)):
                interrupt.vms(engine, ["one", *others], Rung.PAUSE, back=60.0, grace=1.0, reason="")
        assert (gone(engine), engine.store.pool.reservations(engine.facts.name, ended=True)) == ({}, ())
    assert site.world.vm("one").state is State.RUNNING


def test_who_is_paused_for_others_is_not_sent_to_virsh(site: FakeSite) -> None:
    add(site, "one")
    with small(site, 2048) as engine:
        interrupt.vms(engine, ["one"], Rung.PAUSE, back=60.0, grace=1.0, reason="")
        with pytest.raises(RefusedError, match="was interrupted, and is paused") as refused:
            verbs.start(engine, "one")
        assert refused.value.hint == "hvctl resume one"


def test_a_vm_that_goes_meanwhile_hides_no_pool(site: FakeSite) -> None:
    add(site, "one")
    with small(site, 1024) as engine:
        site.world.fail("balloon", "NotFoundError")
        assert [line["resource"] for line in pool.show(engine)] == ["cpu", "memory", "network", "iops"]


class Meanwhile(Faults):
    """Somebody else does something between two operations of a demand."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__("")
        self._what = what

    def point(self, kind: str, step: str, when: str) -> None:
        if (kind, step, when) == ("demand", "reserved", "after"):
            self._what()


def test_who_was_protected_meanwhile_stays(site: FakeSite) -> None:
    """Between the choice of the victim and its turn."""
    add(site, "spot")
    with small(site, 512) as engine, small(site, 512) as other:
        engine.faults = Meanwhile(lambda: verbs.protect(other, "spot", True))
        with pytest.raises(RefusedError, match="spot is protected"):
            interrupt.for_need(engine, saves(100))
        assert site.world.vm("spot").state is State.RUNNING
        assert (gone(engine), "new" in reserved(engine)) == ({}, False)
        with pytest.raises(RefusedError, match="spot is protected"):
            interrupt.vms(engine, ["spot"], Rung.SAVE, back=HOUR, grace=1.0, reason="a test")


def test_a_victim_that_others_started_or_removed(site: FakeSite) -> None:
    add(site, "back")
    add(site, "lost")
    with small(site, 2048, checked=False) as engine:
        interrupt.vms(engine, ["back", "lost"], Rung.SAVE, back=60.0, grace=1.0, reason="a test")
        site.world.start("back")
        site.world.undefine("lost")
    with small(site, 2048, later=60.0, checked=False) as engine:
        done = comeback.due(engine)
        assert [o.vm_name for o in done.outcomes] == ["back"]
        assert [(a.vm_name, why) for a, why in done.left] == [("lost", "the VM is not there any more")]
        assert gone(engine) == {}
        with pytest.raises(NotFoundError, match="is not away"):
            comeback.resume(engine, ["back"])


def test_dry_runs_change_nothing(site: FakeSite) -> None:
    add(site, "spot")
    before = site.world.read()
    with small(site, 512) as engine:
        report = interrupt.for_need(engine, saves(300), dry_run=True)
        assert report.plan is not None
        assert [t.seen.vm.name for t in report.plan.turns] == ["spot"]
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=1.0, reason="", dry_run=True)
        assert (reserved(engine), gone(engine), journal(engine, "interrupt")) == ({}, {}, [])
    assert site.world.read() == before


def test_the_pool_adds_up(site: FakeSite) -> None:
    add(site, "one", used=100)
    with small(site, 1024) as engine:
        pool.reserve(engine, pool.Wanted("x", "", Resources(100, 200 * MIB), 1000.0, None, 60.0))
        memory = next(r for r in pool.show(engine) if r["resource"] == "memory")
        assert (memory["allocated"], memory["used"], memory["reserved"]) == (512 * MIB, 100 * MIB, 200 * MIB)
        assert memory["free"] == (1024 - 512 - 200) * MIB
        pool.set_limits(engine, replace(pool.limits(engine), memory_overcommit=2.0))
        assert next(r for r in pool.show(engine) if r["resource"] == "memory")["overcommit"] == 2.0
    with small(site, 1024, later=60.0) as engine:
        (row,) = pool.reservations(engine)
        assert row["kept"]["memory"] == 100 * MIB, "half of it went back"
        assert row["wasted"]["memory"] == 1.0
        assert pool.release(engine, row["id"]).state is Held.ENDED
        assert pool.release(engine, row["id"]).state is Held.ENDED
        assert pool.reservations(engine) == []
        with pytest.raises(NotFoundError):
            pool.release(engine, 99)


def test_who_was_squeezed_and_then_saved_comes_back_whole(site: FakeSite) -> None:
    add(site, "spot", used=100)
    with small(site, 512) as engine:
        interrupt.for_need(engine, ask(100))
        interrupt.for_need(engine, saves(400, owner="another"))
        assert site.world.vm("spot").state is State.OFF
        assert gone(engine)["spot"].had.allocation.memory == 512 * MIB
    with small(site, 512, later=HOUR) as engine:
        comeback.due(engine)
        assert site.world.vm("spot").allocation.memory == 512 * MIB


def test_what_was_set_while_it_was_away_holds(site: FakeSite) -> None:
    add(site, "spot")
    with small(site, 2048) as engine:
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=1.0, reason="a test")
        verbs.configure(engine, "spot", priority=7)
        allocate(engine, "spot", Change(memory=600 * MIB))
        comeback.resume(engine, ["spot"])
        record = site.world.vm("spot").record
        assert record is not None
        assert (record.priority, record.allocation.memory) == (7, 600 * MIB)
        assert site.world.vm("spot").allocation.memory == 600 * MIB
        assert reserved(engine) == {}, "it came back before, and needs nothing kept for later"


def test_a_saved_guest_wakes_up_with_what_it_had_whatever_was_set_meanwhile(site: FakeSite) -> None:
    """Nobody knows yet how much of it is in use, and what it has must be promised."""
    add(site, "spot", used=400)
    with small(site, 512) as engine:
        interrupt.vms(engine, ["spot"], Rung.SAVE, back=60.0, grace=1.0, reason="a test")
        allocate(engine, "spot", Change(memory=128 * MIB))
        comeback.resume(engine, ["spot"])
        record = site.world.vm("spot").record
        assert record is not None
        assert record.allocation.memory == site.world.vm("spot").allocation.memory == 512 * MIB


def test_nothing_is_kept_for_the_return_of_who_did_not_go(site: FakeSite) -> None:
    cheap = add(site, "cheap", priority=1)
    other = add(site, "next", priority=900)
    with small(site, 1024) as engine:
        with pytest.raises(RefusedError):
            site.world.pause("cheap")
            interrupt.vms(engine, ["cheap"], Rung.SAVE, back=HOUR, grace=1.0, reason="a test")
        assert reserved(engine) == {}
        site.world.resume("cheap")
        site.world.fail("save", uuid=cheap)
        interrupt.for_need(engine, saves(300))
        kept = reserved(engine)
        assert set(kept) == {"new", other}
        assert (kept[other].demand, kept[other].granted.memory) == (kept["new"].id, 512 * MIB)
        assert gone(engine)["next"].returns == kept[other].id


def test_who_gave_of_its_own_is_not_asked_twice(site: FakeSite) -> None:
    """What it had stays known until it has it again."""
    add(site, "one", priority=1)
    add(site, "two", priority=2)
    add(site, "near", interruptible=False, priority=0, used=100)
    with small(site, 3 * 512) as engine:
        interrupt.for_need(engine, saves(100, seconds=None))
        assert site.world.vm("near").allocation.memory == 412 * MIB
        with pytest.raises(RefusedError, match="could not come back"):
            interrupt.for_need(engine, saves(400, owner="second", seconds=None))
    with small(site, 3 * 512, later=HOUR) as engine:
        pool.release(engine, reserved(engine)["new"].id)
        comeback.due(engine)
        assert site.world.vm("near").allocation.memory == 512 * MIB


def test_a_demand_that_was_released_half_way_leaves_its_neighbours_whole(site: FakeSite) -> None:
    add(site, "spot", priority=1)
    add(site, "near", interruptible=False, used=100)
    site.world.fail("save", "DeadlineError")
    with small(site, 1024) as engine:
        with pytest.raises(NotUndoneError):
            interrupt.for_need(engine, saves(200, seconds=2 * HOUR))
        assert site.world.vm("near").allocation.memory == 312 * MIB
        pool.release(engine, reserved(engine)["new"].id)
        recover(engine)
        assert comeback.resume(engine, ["spot"]).warnings == ()
        assert site.world.vm("near").allocation.memory == 512 * MIB
        assert site.world.vm("spot").state is State.RUNNING


def test_whoever_carries_it_on_finds_who_went_already(site: FakeSite) -> None:
    """The owner died before the victim's operation was closed; the next one ends that, and takes nobody else."""
    uuid = add(site, "spot", priority=1)
    add(site, "other", priority=900)
    site.world.fail("save", "DeadlineError", after=True)
    with small(site, 1024) as engine:
        with pytest.raises(NotUndoneError):
            interrupt.for_need(engine, saves(300))
        comeback.due(engine)
        assert reserved(engine)["new"].state is Held.HELD
        assert set(gone(engine)) == {"spot"}
        assert gone(engine)["spot"].returns == reserved(engine)[uuid].id
        assert site.world.vm("other").state is State.RUNNING


def test_a_demand_is_carried_on_by_one_at_a_time(site: FakeSite) -> None:
    """Another one would find the same victims, and one more for what is on its way already."""
    add(site, "spot", priority=1)
    site.world.fail("save", "DeadlineError")
    with small(site, 512) as engine:
        with pytest.raises(NotUndoneError):
            interrupt.for_need(engine, saves(300))
        waits = reserved(engine)["new"]
        with vm_lock(engine.settings.locks_dir, f"demand-{waits.id}", 0):
            assert demand.finish(engine, demand.Progress()) == []
            with pytest.raises(BusyError):
                demand.carry_on(engine, waits.id, demand.Progress(), wait=0.0)
            assert reserved(engine)["new"] == waits
        recover(engine)
        assert (reserved(engine)["new"].state, set(gone(engine))) == (Held.HELD, {"spot"})


@pytest.mark.parametrize("by", ["somebody", "resume"])
def test_nobody_goes_twice_for_one_demand(site: FakeSite, by: str) -> None:
    """Its first victim runs again while the demand still waits for its second, and what it has would be enough now,
    since somebody else's VM has ended."""
    add(site, "one", priority=1)
    add(site, "ends", interruptible=False)
    two = add(site, "two", priority=900)
    site.world.fail("save", "DeadlineError", uuid=two)
    with small(site, 3 * 512, checked=False) as engine:
        with pytest.raises(NotUndoneError):
            interrupt.for_need(engine, saves(900))
        site.world.destroy("ends")
        site.world.fail("save", uuid=two, times=9)
        if by == "somebody":
            site.world.start("one")
        else:
            comeback.resume(engine, ["one"])
        recover(engine)
        assert [o.vm_name for o in journal(engine, "interrupt")].count("one") == 1
        assert "new" not in reserved(engine), "it was given up"
        assert site.world.vm("one").state is State.RUNNING
        site.world.destroy("one")


def test_who_was_given_more_while_squeezed_is_squeezed_from_that(site: FakeSite) -> None:
    """To just what it had before the first time, as it happens."""
    add(site, "spot", used=100)
    with small(site, 900) as engine:
        interrupt.for_need(engine, ask(488))
        assert site.world.vm("spot").allocation.memory == 412 * MIB
        pool.release(engine, reserved(engine)["new"].id)
        allocate(engine, "spot", Change(memory=700 * MIB))
        interrupt.for_need(engine, ask(388, owner="next"))
        assert site.world.vm("spot").allocation.memory == 512 * MIB
