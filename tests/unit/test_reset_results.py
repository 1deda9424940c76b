"""What a reset answers and journals: how long, how coherent, by which tracker, and what was not as it should be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine.faults import Faults
from hvctl.engine.operate import Engine
from hvctl.errors import Exit, GuestError, HvctlError, NotUndoneError, RefusedError, UndoneError, UsageError
from hvctl.model.operation import OpState, Outcome
from hvctl.model.reset import AS_USUAL, WHOLE, DiskPart, Hooks, Scope, Wishes
from hvctl.model.snapshot import Range
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import State
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from unit.enginehost import add_image, last, new_vm, seen

RANGE = Range(0x1000000, 0x3000000)
DISK = Scope(False, False, (DiskPart("vda"),))
UFFD, SOFT, COMPARE = TrackerKind.UFFD, TrackerKind.SOFT_DIRTY, TrackerKind.COMPARE


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvctl.engine.snapshothands.AGENT_SECONDS", 0.2)
    monkeypatch.setattr("hvctl.decide.reset.AGENT_SECONDS", 0.2)


def taken(engine: Engine, site: FakeSite, own: tuple[Range, ...] = (), **behaviour: Any) -> dict[str, str]:
    """A guest that worked since its snapshot; what it was then."""
    add_image(site)
    verbs.create(engine, new_vm("a"))
    site.world.set_behaviour("a", **behaviour)
    site.world.spoil("a", "first")
    content = site.world.content("a")
    snapshots.take(engine, "a", "s", owned=own)
    site.world.spoil("a")
    return content


def reset(engine: Engine, scope: Scope = WHOLE, **wishes: Any) -> Outcome:
    return snapshots.reset(engine, "a", "s", scope, replace(AS_USUAL, **wishes))


# --- the result


def test_what_a_whole_reset_says(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    process = site.world.vm("a").process
    result = reset(engine).result
    assert process is not None
    assert result["process"]["pid"] == process.pid
    assert {k: result[k] for k in ("snapshot", "warmth", "coherence", "tracker", "uniqueness")} == {
        "snapshot": "s", "warmth": "warm", "coherence": "coherent", "tracker": "uffd", "uniqueness": "reseeded",
    }  # fmt: skip
    assert result["scope"] == ["ram", "devices", "all disks"]
    assert result["pages"] == result["bytes"] > 0
    assert 0 < result["paused"] <= result["continued_after"]
    assert result["first_life"] > 0
    assert "missed" not in result, "it was not audited"
    row = engine.store.operation(last(engine).id)
    assert row.result == {**result, "warnings": [], "goal": "reset a to s", "reasons": []}
    assert all(s.seconds >= 0 for s in row.steps)


def test_the_pause_is_what_lies_between_stop_and_go(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    outcome = reset(engine)
    inside = [s.seconds for s in outcome.steps if s.name in ("restore_ram", "load_state", "drop_queues", "resume")]
    assert sum(inside) <= outcome.result["paused"] + 0.001
    assert outcome.result["paused"] <= sum(s.seconds for s in outcome.steps) + 1


def test_a_take_tells_of_both_its_pauses(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    verbs.create(engine, new_vm("a"))
    outcome = snapshots.take(engine, "a", "s")
    assert [s.name for s in outcome.steps].count("pause") == 2
    under = [s for s in outcome.steps if s.name in ("arm_tracker", "save_state", "publish_snapshot")]
    assert outcome.result["paused"] >= sum(s.seconds for s in under)
    assert outcome.result["parent"] is None
    child = snapshots.take(engine, "a", "t").result
    assert child["parent"] == outcome.result["id"]


def test_without_a_reseed_nobody_is_promised_to_be_unique(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    assert reset(engine, reseed=False).result["uniqueness"] == "not guaranteed"
    site.world.set_behaviour("a", answers_pulse=False)
    silent = reset(engine)
    assert silent.result["uniqueness"] == "not guaranteed"
    assert "first_life" not in silent.result
    assert silent.warnings


def test_by_the_agent_it_is_reseeded_too(engine: Engine, site: FakeSite) -> None:
    add_image(site)
    verbs.create(engine, new_vm("a"))
    site.world.unplug_pulse("a")
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    found = reset(engine)
    assert found.result["uniqueness"] == "reseeded"
    assert "first_life" not in found.result
    assert [s.name for s in found.steps][-3:] == ["await_agent", "set_clock", "reseed"]


@pytest.mark.parametrize(
    ("scope", "coherence", "said"),
    [
        (DISK, "coherent", ["disk:vda"]),
        (Scope(False, False, None), "coherent", ["disk:vda"]),
        (Scope(False, False, (DiskPart("data", Range(0, 512)),)), "crash-consistent", ["disk:data:0x0-0x200"]),
        (Scope(False, False, (), ranges=(RANGE,)), "coherent", ["ram:0x1000000-0x3000000"]),
        (Scope(True, False, ()), "incoherent", ["ram"]),
        (Scope(keep=("data",)), "coherent", ["ram", "devices", "all disks but data"]),
        (Scope(False, False, (), net=True), None, ["net"]),
        (Scope(False, False, (DiskPart("vda"),), net=True), "coherent", ["disk:vda", "net"]),
    ],
)
def test_what_a_reset_of_parts_says(
    engine: Engine, site: FakeSite, scope: Scope, coherence: str | None, said: list[str]
) -> None:
    taken(engine, site, own=(RANGE,))
    result = reset(engine, scope, accept_incoherent=coherence == "incoherent").result
    assert result.get("coherence") == coherence
    assert result["scope"] == said
    assert ("paused" in result) is (scope.ram or scope.devices or bool(scope.ranges))


def test_what_may_be_expected_is_what_earlier_ones_took(engine: Engine, site: FakeSite) -> None:
    taken(engine, site, agent_gap=0)
    preview = snapshots.reset(engine, "a", "s", dry_run=True)
    assert preview.result["expected"] == {}
    real = []
    for _ in range(3):
        real.append(reset(engine).result)
        site.world.spoil("a")
    reset(engine, DISK)
    site.world.spoil("a")
    found = snapshots.reset(engine, "a", "s", dry_run=True).result["expected"]
    assert found["resets"] == 3
    assert found["paused"] == sorted(r["paused"] for r in real)[1]
    assert found["bytes"] == sorted(r["bytes"] for r in real)[1]
    disk = snapshots.reset(engine, "a", "s", DISK, dry_run=True).result["expected"]
    assert (disk["resets"], disk["paused"], disk["took"] > 0) == (1, None, True)
    assert snapshots.reset(engine, "a", "s", dry_run=True).result["coherence"] == "coherent"


# --- audits


def test_an_audit_that_finds_nothing(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site)
    assert reset(engine, audit=True).result["missed"] == 0
    assert site.world.content("a") == content


def test_what_an_audit_finds_is_mended_told_and_not_a_success(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site, tracker_misses=5)
    with pytest.raises(HvctlError) as failed:
        reset(engine, audit=True)
    assert failed.value.exit is Exit.FAILED
    assert "5 pages" in failed.value.message
    assert failed.value.hint == f"hvctl operation show {last(engine).id}"
    row = last(engine)
    assert row.state is OpState.FAILED
    assert row.reason is not None
    assert "5 pages that the tracker had missed" in row.reason
    assert row.result is not None
    assert row.result["missed"] == 5
    vm = site.world.vm("a")
    assert (site.world.content("a"), vm.state, vm.torn) == (content, State.RUNNING, False), "the VM is right"
    assert [s.name for s in row.steps if s.outcome != "done"] == []
    assert engine.store.open_operations(engine.facts.name) == ()
    assert engine.store.record_of(engine.facts.name, vm.uuid) == vm.record


def test_a_tracker_that_missed_pages_is_not_used_again(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site, tracker_misses=5)
    with pytest.raises(HvctlError):
        reset(engine, audit=True)
    for _ in range(2):
        site.world.spoil("a")
        found = reset(engine, audit=True)
        assert (found.result["tracker"], found.result["missed"]) == ("compare", 0)
        assert site.world.content("a") == content
    why = next(s.facts["why"] for s in found.steps if s.name == "restore_ram")
    assert "missed" in why
    with pytest.raises(RefusedError, match="missed"):
        reset(engine, tracker=UFFD)


def test_without_an_audit_nobody_sees_what_was_missed(engine: Engine, site: FakeSite) -> None:
    """So that the tests above are about something."""
    content = taken(engine, site, tracker_misses=5)
    assert reset(engine).state is OpState.DONE
    assert site.world.content("a")["ram"] != content["ram"]


def test_every_nth_reset_is_audited(engine: Engine, site: FakeSite) -> None:
    engine.settings = replace(engine.settings, audit_every=3)
    taken(engine, site)
    audited = []
    for _ in range(7):
        audited.append("missed" in reset(engine).result)
        site.world.spoil("a")
    assert audited == [False, False, True, False, False, True, False]
    assert "missed" not in reset(engine, audit=False).result
    assert "missed" not in reset(engine, audit=False).result, "never is never"
    engine.settings = replace(engine.settings, audit_every=0)
    assert not any("missed" in reset(engine).result for _ in range(4))


def test_an_audit_whose_repair_fails_leaves_the_guest_paused(engine: Engine, site: FakeSite) -> None:
    taken(engine, site, tracker_misses=5)
    site.world.fail("load_state", "GuestError", nth=2)
    with pytest.raises(NotUndoneError, match="mixed"):
        reset(engine, audit=True)
    assert last(engine).state is OpState.QUARANTINED
    assert site.world.vm("a").state is State.PAUSED


def test_a_reset_that_is_repeated_by_recovery_is_audited_as_well(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site, tracker_misses=5)
    site.world.fail("audit", "DeadlineError")
    with pytest.raises(NotUndoneError, match="unknown"):
        reset(engine, audit=True)
    (ended,) = engine.sweep()
    assert site.world.content("a") == content
    assert site.world.vm("a").state is State.RUNNING
    assert ended.state is OpState.FAILED
    assert "recovered" in str(ended.reason)
    assert "5 pages that the tracker had missed" in str(ended.reason)


# --- trackers by name


def test_a_tracker_that_does_not_work_is_refused_before_anything_is_written(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    before = seen(site.world)
    for scope in (WHOLE, Scope(True, False, ())):
        with pytest.raises(RefusedError, match="soft-dirty cannot be used"):
            reset(engine, scope, tracker=SOFT, accept_incoherent=True)
        assert last(engine).state is OpState.UNDONE
        assert seen(site.world) == before
    assert reset(engine).state is OpState.DONE


def test_one_that_works_is_used_and_goes_on_being_used(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site, trackers=[UFFD, SOFT])
    first = reset(engine, tracker=SOFT)
    assert first.result["tracker"] == "compare", "nothing was noted by it yet"
    site.world.spoil("a")
    assert reset(engine, tracker=SOFT).result["tracker"] == "soft-dirty"
    site.world.spoil("a")
    assert reset(engine).result["tracker"] == "soft-dirty"
    assert site.world.content("a") == content


def test_comparing_is_always_to_be_had(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site, trackers=[])
    for tracker in (COMPARE, TrackerKind.AUTO):
        found = reset(engine, tracker=tracker)
        assert found.result["tracker"] == "compare"
        assert site.world.content("a") == content
        site.world.spoil("a")


def test_recovery_takes_the_tracker_that_works(engine: Engine, site: FakeSite) -> None:
    """The one that was asked for may have gone meanwhile: that is no reason to leave a guest paused."""
    content = taken(engine, site, trackers=[UFFD, SOFT])
    site.world.fail("load_state", "DeadlineError")
    with pytest.raises(NotUndoneError):
        reset(engine, tracker=SOFT)
    site.world.set_behaviour("a", trackers=[])
    assert [o.state for o in engine.sweep()] == [OpState.DONE]
    assert site.world.content("a") == content


# --- parts


def test_a_range_of_memory_comes_back_and_the_vcpus_with_the_rest_stay(engine: Engine, site: FakeSite) -> None:
    then = taken(engine, site, own=(RANGE,))
    now = site.world.content("a")
    reset(engine, Scope(False, False, (), ranges=(RANGE,)))
    found = site.world.content("a")
    assert {k: found[k] for k in ("devices", "vda")} == {k: now[k] for k in ("devices", "vda")}
    assert len({now["ram"], found["ram"], then["ram"]}) == 3
    assert engine.host.machine.snapshots(hidden=True) == engine.host.machine.snapshots()


def test_what_the_guest_uses_or_does_not_say_is_refused(engine: Engine, site: FakeSite) -> None:
    taken(engine, site, mounted=["vda"])
    before = seen(site.world)
    for scope in (DISK, Scope(False, False, None), Scope(keep=("vda",)), Scope(True, True, ())):
        with pytest.raises(RefusedError, match=r"uses vda|used vda") as refused:
            reset(engine, scope)
        assert refused.value.exit is Exit.REFUSED
    site.world.set_behaviour("a", agent="silent")
    with pytest.raises(RefusedError, match="does not say"):
        reset(engine, DISK)
    site.world.set_behaviour("a", agent="present")
    assert seen(site.world) == before
    assert reset(engine, DISK, accept_incoherent=True).result["coherence"] == "incoherent"


def test_hooks_have_the_guest_let_go_first(engine: Engine, site: FakeSite) -> None:
    then = taken(engine, site, mounted=["vda"])
    hooks = Hooks((("/bin/umount", "vda"),), (("/bin/mount", "vda"),))
    assert reset(engine, DISK, hooks=hooks).state is OpState.DONE
    assert site.world.content("a")["vda"] == then["vda"]
    assert site.world.vm("a").executed[-2:] == ["/bin/umount vda", "/bin/mount vda"]


@pytest.mark.parametrize("how", ["says no", "does nothing", "is not there"])
def test_a_guest_that_does_not_let_go_keeps_its_disk(engine: Engine, site: FakeSite, how: str) -> None:
    taken(engine, site, mounted=["vda"])
    before = seen(site.world)
    hooks = Hooks((("/bin/umount" if how == "is not there" else "/bin/letgo", "vda"),))
    if how == "says no":
        from hvctl.adapters.fake.state import Exec

        site.world.set_behaviour("a", exec={"/bin/letgo vda": Exec(1, err="it is busy\n")})
    elif how == "is not there":
        site.world.set_behaviour("a", refuses=["guest-exec"])
    with pytest.raises(UndoneError if how == "is not there" else RefusedError) as failed:
        reset(engine, DISK, hooks=hooks)
    assert last(engine).state is OpState.UNDONE
    if how == "says no":
        assert "it is busy" in failed.value.message
    elif how == "does nothing":
        assert "still uses vda" in failed.value.message
    site.world.set_behaviour("a", exec={}, refuses=[])
    assert seen(site.world) == before


def test_hooks_after_a_reset_only_warn(engine: Engine, site: FakeSite) -> None:
    from hvctl.adapters.fake.state import Exec

    taken(engine, site, exec={"hostname new": Exec(3, err="no such name")})
    outcome = reset(engine, hooks=Hooks(after=(("hostname", "new"), ("true",))))
    assert outcome.state is OpState.DONE
    assert [w for w in outcome.warnings if "status 3" in w and "no such name" in w]
    assert site.world.vm("a").executed[-2:] == ["hostname new", "true"]


def test_a_snapshot_must_be_named_where_one_is_needed(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    for scope in (WHOLE, DISK, Scope(True, False, ()), Scope(False, False, None)):
        with pytest.raises(UsageError, match="snapshot"):
            snapshots.reset(engine, "a", None, scope)
    assert snapshots.reset(engine, "a", None, Scope(False, False, (), net=True)).state is OpState.DONE


def test_the_cache_of_a_guest_that_does_not_run_is_refused_at_once(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    site.world.pause("a")
    number = last(engine).id
    with pytest.raises(RefusedError, match="page cache"):
        snapshots.reset(engine, "a", None, Scope(False, False, (), cache=True))
    assert last(engine).id == number, "nothing was begun"


@pytest.mark.parametrize(
    "scope", [Scope(True, False, ()), Scope(False, True, ()), Scope(False, False, (), ranges=(RANGE,))]
)
def test_a_paused_vm_stays_paused_through_a_reset_of_parts(engine: Engine, site: FakeSite, scope: Scope) -> None:
    taken(engine, site, own=(RANGE,))
    site.world.pause("a")
    assert reset(engine, scope, accept_incoherent=True).state is OpState.DONE
    assert site.world.vm("a").state is State.PAUSED
    site.world.resume("a")
    assert not site.world.vm("a").torn


PARTS: tuple[Scope, ...] = (
    WHOLE, Scope(keep=("vda",)), Scope(True, False, ()), Scope(False, True, ()),
    Scope(False, False, (), ranges=(RANGE,)),
)  # fmt: skip


@pytest.mark.parametrize("scope", PARTS)
def test_a_failed_load_of_any_part_never_continues_the_guest(engine: Engine, site: FakeSite, scope: Scope) -> None:
    taken(engine, site, own=(RANGE,))
    site.world.fail("load_state", "GuestError")
    with pytest.raises(NotUndoneError, match="mixed"):
        reset(engine, scope, accept_incoherent=True)
    assert last(engine).state is OpState.QUARANTINED
    engine.sweep()
    assert site.world.vm("a").state is State.PAUSED


@pytest.mark.parametrize("scope", PARTS)
@pytest.mark.parametrize("call", ["restore_ram:1", "restore_ram:2", "resume:1"])
@pytest.mark.parametrize("error", ["HvctlError", "enospc", "DeadlineError"])
def test_past_the_point_of_no_return_every_part_is_finished(
    engine: Engine, site: FakeSite, scope: Scope, call: str, error: str
) -> None:
    taken(engine, site, own=(RANGE,))
    once = site.world.content("a")
    name, _, number = call.partition(":")
    site.world.fail(name, error, nth=int(number))
    with pytest.raises(NotUndoneError, match="stays open"):
        reset(engine, scope, accept_incoherent=True)
    assert [o.state for o in engine.sweep()] == [OpState.DONE]
    mended = site.world.content("a")
    assert mended != once
    assert site.world.vm("a").state is State.RUNNING
    assert not site.world.vm("a").torn
    assert all(not s.hidden for s in engine.host.machine.snapshots(hidden=True))
    site.world.spoil("a")
    reset(engine)
    assert site.world.content("a") != mended or scope == WHOLE


@pytest.mark.parametrize("call", ["prepare", "save_state", "copy_ram", "patch_ram", "publish"])
@pytest.mark.parametrize("error", ["HvctlError", "enospc"])
def test_before_it_a_part_is_as_it_was(engine: Engine, site: FakeSite, call: str, error: str) -> None:
    taken(engine, site, own=(RANGE,))
    before = seen(site.world)
    site.world.fail(call, error)
    with pytest.raises(UndoneError):
        reset(engine, Scope(False, False, (), ranges=(RANGE,)))
    assert site.world.read().scripts == []
    assert seen(site.world) == before


def test_faults_of_a_second_time() -> None:
    faults = Faults("reset:restore_ram#2:before=raise,reset:pause:after=raise")
    faults.point("reset", "restore_ram", "before")
    with pytest.raises(HvctlError, match="restore_ram"):
        faults.point("reset", "restore_ram", "before")
    with pytest.raises(HvctlError):
        faults.point("reset", "pause", "after")
    with pytest.raises(UsageError):
        Faults("reset:restore_ram#x:before=raise")
    assert issubclass(GuestError, HvctlError)
    assert Wishes() == AS_USUAL
