"""The engine against guests that refuse, lie or say nothing, and against VMs that somebody protected or paused."""

from __future__ import annotations

from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine import hands
from hvctl.engine.operate import Engine
from hvctl.errors import Exit, NotUndoneError, RefusedError, UndoneError
from hvctl.model.allocation import Change, DiskChange
from hvctl.model.operation import OpState
from hvctl.model.vm import State
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from unit.enginehost import MIB, add_image, last, new_vm, promised, seen


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "ONLINE_SECONDS", 0.0)
    monkeypatch.setattr(hands, "AGENT_SECONDS", 0.2)
    monkeypatch.setattr("hvctl.decide.reset.AGENT_SECONDS", 0.2)


def managed(engine: Engine, site: FakeSite, behaviour: dict[str, Any] | None = None, **parts: Any) -> str:
    add_image(site)
    uuid = verbs.create(engine, new_vm("a", **parts)).vm_uuid
    site.world.set_behaviour("a", **(behaviour or {}))
    return uuid


def undone(engine: Engine, site: FakeSite, change: Change, match: str) -> None:
    """The change fails and everything is as it was: guest, host and promises."""
    before, ledger = seen(site.world), promised(engine)
    with pytest.raises(UndoneError, match=match) as failed:
        allocate(engine, "a", change)
    assert failed.value.exit is Exit.UNDONE
    assert seen(site.world) == before
    assert promised(engine) == ledger
    assert last(engine).state is OpState.UNDONE


# --- vCPUs


def test_a_guest_that_refuses_to_take_a_vcpu_offline(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"refuses": ["guest-set-vcpus"]}, vcpus=3)
    undone(engine, site, Change(vcpus=1, cpu_quota=50), "refused guest-set-vcpus")


def test_a_guest_that_claims_to_obey_and_does_not(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"answers": {"guest-set-vcpus": 2}}, vcpus=3)
    undone(engine, site, Change(vcpus=1), "does not switch the rest")


def test_an_agentless_guest_that_keeps_its_vcpus(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"agent": "absent", "keeps_vcpus": True}, vcpus=3)
    undone(engine, site, Change(vcpus=1), "keeps vCPU 2")


def test_a_guest_that_brings_no_new_vcpu_online(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"onlines_vcpus": False, "refuses": ["guest-set-vcpus"]})
    undone(engine, site, Change(vcpus=2), "refused guest-set-vcpus")


def test_a_vcpu_that_stays_plugged_is_offline_and_said(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"keeps_vcpus": True}, vcpus=3)
    outcome = allocate(engine, "a", Change(vcpus=1))
    assert [w for w in outcome.warnings if "still plugged" in w]
    assert site.world.vm("a").online == [True, False, False]
    assert promised(engine)[outcome.vm_uuid][0].resources.cpu == 100
    allocate(engine, "a", Change(vcpus=2))
    assert site.world.vm("a").online == [True, True, False]


@pytest.mark.parametrize("agent", ["absent", "silent", "hostile"])
@pytest.mark.parametrize("pulse", ["none", "present", "silent"])
def test_a_bad_agent_or_pulse_costs_a_reset_only_warnings(
    engine: Engine, site: FakeSite, agent: str, pulse: str
) -> None:
    """A guest that gives a sign of life reseeds and sets its clock with it, and its agent is not asked at all."""
    managed(engine, site, {"agent": agent, "answers_pulse": pulse != "silent"})
    if pulse == "none":
        site.world.unplug_pulse("a")
    snapshots.take(engine, "a", "s")
    before = site.world.content("a")
    site.world.spoil("a")
    outcome = snapshots.reset(engine, "a", "s")
    assert outcome.state is OpState.DONE
    if pulse == "present":
        assert (outcome.warnings, outcome.result["uniqueness"]) == ((), "reseeded")
    elif pulse == "silent":
        assert [w for w in outcome.warnings if "sign of life" in w]
    else:
        assert outcome.warnings or [r for r in outcome.reasons if "random generator" in r]
    assert outcome.result["uniqueness"] == ("reseeded" if pulse == "present" else "not guaranteed")
    assert site.world.content("a") == before
    assert last(engine).state is OpState.DONE
    kept = engine.store.operation(last(engine).id).result
    said = {"warnings": list(outcome.warnings), "goal": outcome.goal, "reasons": list(outcome.reasons)}
    assert kept == outcome.result | said


@pytest.mark.parametrize("agent", ["absent", "silent", "hostile"])
def test_a_bad_agent_and_everything_that_does_not_need_it(engine: Engine, site: FakeSite, agent: str) -> None:
    managed(engine, site, {"agent": agent}, vcpus=2)
    outcome = allocate(engine, "a", Change(memory=512 * MIB, cpu_quota=50, disks=(DiskChange(None, iops=9),)))
    assert outcome.state is OpState.DONE
    assert site.world.vm("a").allocation.memory == 512 * MIB


def test_a_hostile_agent_cannot_make_a_shrink_look_done(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"agent": "hostile"}, vcpus=2)
    undone(engine, site, Change(vcpus=1), "guest-get-vcpus")


# --- memory


def test_a_balloon_that_stops_half_way_is_given_back(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"balloon_floor": 200 * MIB}, vcpus=2)
    undone(engine, site, Change(memory=128 * MIB, vcpus=1), "stopped at 200 MiB on the way to 128 MiB")


def test_best_effort_keeps_what_was_reached_and_promises_that(engine: Engine, site: FakeSite) -> None:
    uuid = managed(engine, site, {"balloon_floor": 200 * MIB})
    outcome = allocate(engine, "a", Change(memory=128 * MIB), best_effort=True)
    assert outcome.state is OpState.DONE
    assert outcome.warnings == ("the guest gave only down to 200 MiB",)
    assert outcome.result["after"]["memory"] == 200 * MIB
    vm = site.world.vm("a")
    assert vm.allocation.memory == 200 * MIB
    assert vm.record is not None
    assert vm.record.allocation.memory == 200 * MIB
    promise, record = promised(engine)[uuid]
    assert promise.resources.memory == 200 * MIB
    assert record == vm.record


def test_best_effort_stops_at_what_the_guest_uses(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"used_memory": 150 * MIB})
    outcome = allocate(engine, "a", Change(memory=64 * MIB), best_effort=True)
    assert outcome.result["after"]["memory"] == 182 * MIB
    assert site.world.vm("a").allocation.memory == 182 * MIB


def test_memory_in_use_is_not_taken(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"used_memory": 150 * MIB})
    with pytest.raises(RefusedError, match="182 MiB"):
        allocate(engine, "a", Change(memory=181 * MIB))
    assert site.world.vm("a").allocation.memory == 256 * MIB
    assert allocate(engine, "a", Change(memory=182 * MIB)).state is OpState.DONE


def test_memory_that_came_into_use_since_the_plan_is_not_taken(engine: Engine, site: FakeSite) -> None:
    managed(engine, site)
    before = seen(site.world)
    engine.store.open_operation = _and_then(  # type: ignore[method-assign]
        engine.store.open_operation, lambda: site.world.set_behaviour("a", used_memory=240 * MIB)
    )
    with pytest.raises(UndoneError, match="now uses more"):
        allocate(engine, "a", Change(memory=128 * MIB))
    assert seen(site.world) == before


def _and_then(call: Any, then: Any) -> Any:
    def both(**arguments: Any) -> Any:
        result = call(**arguments)
        then()
        return result

    return both


def test_without_statistics_memory_shrinks_only_by_force(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"balloon_stats": False})
    with pytest.raises(RefusedError, match="no memory statistics"):
        allocate(engine, "a", Change(memory=128 * MIB))
    assert allocate(engine, "a", Change(memory=128 * MIB), force=True).state is OpState.DONE
    assert site.world.vm("a").allocation.memory == 128 * MIB


# --- protected, paused, ended


def test_a_protected_vm_is_neither_stopped_reset_nor_deleted(engine: Engine, site: FakeSite) -> None:
    managed(engine, site)
    snapshots.take(engine, "a", "s")
    verbs.protect(engine, "a", True)
    before = seen(site.world)
    for refused in (
        lambda: verbs.stop(engine, "a", force=True, seconds=1),
        lambda: verbs.delete(engine, "a", force=True),
        lambda: snapshots.reset(engine, "a", "s"),
    ):
        with pytest.raises(RefusedError, match="protected"):
            refused()
    assert seen(site.world) == before
    assert allocate(engine, "a", Change(cpu_quota=50)).state is OpState.DONE
    verbs.protect(engine, "a", False)
    assert verbs.stop(engine, "a", force=True, seconds=1).state is OpState.DONE


@pytest.mark.parametrize("promised", [False, True])
def test_a_vm_that_somebody_else_made_is_not_deleted(engine: Engine, site: FakeSite, promised: bool) -> None:
    """Its disks are nobody's here to remove, whether it was given an allocation or not."""
    site.world.add_vm("theirs")
    if promised:
        allocate(engine, "theirs", Change(cpu_quota=50))
    before = seen(site.world)
    with pytest.raises(RefusedError, match="did not create theirs"):
        verbs.delete(engine, "theirs", force=True)
    assert seen(site.world) == before


def test_a_vm_paused_by_its_operator_stays_paused(engine: Engine, site: FakeSite) -> None:
    managed(engine, site)
    snapshots.take(engine, "a", "running")
    site.world.spoil("a")
    site.world.pause("a")
    snapshots.take(engine, "a", "paused")
    allocate(engine, "a", Change(cpu_quota=50))
    assert snapshots.reset(engine, "a", "running").state is OpState.DONE
    assert site.world.vm("a").state is State.PAUSED
    assert "spoiled" not in "".join(site.world.content("a").values())
    site.world.resume("a")
    assert not site.world.vm("a").torn


@pytest.mark.parametrize("call", ["restore_ram", "set_record"])
def test_a_paused_vm_stays_paused_through_a_recovered_reset(engine: Engine, site: FakeSite, call: str) -> None:
    managed(engine, site)
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    site.world.pause("a")
    site.world.fail(call)
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s")
    assert [o.state for o in engine.sweep()] == [OpState.DONE]
    assert site.world.vm("a").state is State.PAUSED
    site.world.resume("a")
    assert not site.world.vm("a").torn


def test_a_reset_promises_what_the_snapshot_had(engine: Engine, site: FakeSite) -> None:
    """Plugged vCPUs are part of what a snapshot is bound to; these stay plugged, as they do under TCG."""
    uuid = managed(engine, site, {"keeps_vcpus": True}, vcpus=2)
    snapshots.take(engine, "a", "s")
    allocate(engine, "a", Change(vcpus=1, memory=512 * MIB, cpu_weight=7))
    assert promised(engine)[uuid][0].resources.cpu == 100
    snapshots.reset(engine, "a", "s")
    promise, record = promised(engine)[uuid]
    assert (promise.resources.cpu, promise.resources.memory) == (200, 256 * MIB)
    assert record == site.world.vm("a").record
    assert record.allocation.cpu_weight == 7, "what the guest does not hold stays promised"
    assert site.world.vm("a").allocation.memory == 256 * MIB


def test_a_reset_to_more_than_the_host_has_left_is_refused(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, memory=40 << 30, max_memory=60 << 30)
    site.world.set_room(64 << 30)
    snapshots.take(engine, "a", "big")
    allocate(engine, "a", Change(memory=1 << 30))
    verbs.create(engine, new_vm("b", memory=40 << 30, max_memory=40 << 30))
    with pytest.raises(RefusedError, match="memory lacks"):
        snapshots.reset(engine, "a", "big")


@pytest.mark.parametrize("outside", ["destroy", "resume"])
def test_somebody_else_in_the_middle_of_a_reset(engine: Engine, site: FakeSite, outside: str) -> None:
    managed(engine, site)
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    site.world.script("restore_ram", outside=outside, uuid=site.world.vm("a").uuid)
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s")
    engine.sweep()
    ended = last(engine)
    assert ended.state is (OpState.FAILED if outside == "destroy" else OpState.QUARANTINED)
    assert engine.store.open_operations(engine.facts.name) == ()


def test_a_guest_that_does_not_power_off_still_runs(engine: Engine, site: FakeSite) -> None:
    managed(engine, site, {"ignores_shutdown": True})
    snapshots.take(engine, "a", "s")
    before = seen(site.world)
    with pytest.raises(UndoneError, match="did not power off") as failed:
        verbs.stop(engine, "a", force=False, seconds=0.01)
    assert failed.value.hint is not None
    assert "--force" in failed.value.hint
    assert seen(site.world) == before
