"""The engine on the fake host: an operation is done, undone or left for recovery, and says which is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine import hands
from hvctl.engine.faults import Faults
from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, Exit, HvctlError, NotUndoneError, RefusedError, UndoneError
from hvctl.model.allocation import Change, NicChange
from hvctl.model.operation import Operation, OpState, Outcome, Phase
from hvctl.model.vm import State
from hvctl.operations import journal
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from unit.enginehost import GROWN, MIB, SHRUNK, add_image, last, new_vm, promised, seen


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes by itself in a fake guest, so nobody waits for it."""
    monkeypatch.setattr(hands, "ONLINE_SECONDS", 0.0)
    monkeypatch.setattr(hands, "AGENT_SECONDS", 0.2)
    monkeypatch.setattr("hvctl.decide.reset.AGENT_SECONDS", 0.2)


def created(engine: Engine, site: FakeSite, **parts: Any) -> str:
    add_image(site)
    return verbs.create(engine, new_vm("a", **parts)).vm_uuid


def snapped(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")


def grown(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    allocate(engine, "a", GROWN)


def stopped(engine: Engine, site: FakeSite) -> None:
    """Off, with promises that a start has to put in force."""
    grown(engine, site)
    verbs.stop(engine, "a", force=True, seconds=1)


def stop(engine: Engine) -> Outcome:
    return verbs.stop(engine, "a", force=False, seconds=0.01)


def delete(engine: Engine) -> Outcome:
    return verbs.delete(engine, "a", force=True)


@dataclass(frozen=True)
class Case:
    """An operation on a prepared world, port calls that take it back, and those after which only forward is left."""

    prepare: Callable[[Engine, FakeSite], Any]
    run: Callable[[Engine], Outcome]
    undone: tuple[str, ...]
    forward: tuple[str, ...] = ()


CASES = {
    "grow": Case(
        created,
        lambda e: allocate(e, "a", GROWN),
        ("set_vcpus", "set_balloon", "set_cpu_quota", "set_cpu_weight", "set_disk_limit", "set_limit", "set_record"),
    ),
    "shrink": Case(
        grown,
        lambda e: allocate(e, "a", SHRUNK),
        ("set_vcpus", "set_balloon", "set_cpu_quota", "set_limit", "set_record"),
    ),
    "create": Case(
        lambda _, site: add_image(site), lambda e: verbs.create(e, new_vm("a")), ("make_disks", "define", "start")
    ),
    "start": Case(stopped, lambda e: verbs.start(e, "a"), ("start", "set_limit")),
    "stop": Case(snapped, stop, ("shutdown",), ("clear", "drop")),
    "delete": Case(snapped, delete, ("destroy",), ("clear", "drop", "undefine", "remove")),
    "take": Case(
        created, lambda e: snapshots.take(e, "a", "s"),
        ("prepare", "pause", "arm", "resume", "copy_ram", "pause:2", "save_state", "copy_ram:2", "publish"),
        ("resume:2",),
    ),
    "reset": Case(
        snapped, lambda e: snapshots.reset(e, "a", "s"), ("ready", "pause"),
        ("restore_ram", "restore_ram:2", "resume", "set_record"),
    ),
    "drop": Case(snapped, lambda e: snapshots.delete(e, "a", "s"), ("drop",)),
    "protect": Case(created, lambda e: verbs.protect(e, "a", True), ("set_record",)),
}  # fmt: skip


def fail(site: FakeSite, call: str, error: str = "HvctlError") -> None:
    """call:2 is the second time that it is called."""
    name, _, number = call.partition(":")
    site.world.fail(name, error, nth=int(number or 1))


UNDONE = [(name, call) for name, case in CASES.items() for call in case.undone]
FORWARD = [(name, call) for name, case in CASES.items() for call in case.forward]


@pytest.mark.parametrize("error", ["HvctlError", "enospc"])
@pytest.mark.parametrize(("name", "call"), UNDONE)
def test_a_failed_step_leaves_everything_as_it_was(
    engine: Engine, site: FakeSite, name: str, call: str, error: str
) -> None:
    case = CASES[name]
    case.prepare(engine, site)
    before, ledger = seen(site.world), promised(engine)
    fail(site, call, error)
    with pytest.raises(UndoneError) as failed:
        case.run(engine)
    assert failed.value.exit is Exit.UNDONE
    assert site.world.read().scripts == []
    assert seen(site.world) == before
    assert promised(engine) == ledger
    row = last(engine)
    assert row.state is OpState.UNDONE
    assert row.steps[-1].outcome.startswith(("failed", "undone"))
    assert case.run(engine).state is OpState.DONE


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_done_before_it_is_written_down(
    engine: Engine, site: FakeSite, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who dies after an effect without a row leaves a guest of which nobody knows what it waits for."""
    case = CASES[name]
    case.prepare(engine, site)
    before, ledger = seen(site.world), promised(engine)

    def locked(**_: object) -> Operation:
        raise BusyError("the database is locked.")

    monkeypatch.setattr(engine.store, "open_operation", locked)
    with pytest.raises(BusyError):
        case.run(engine)
    assert (seen(site.world), promised(engine)) == (before, ledger)


@pytest.mark.parametrize(("name", "call"), FORWARD)
def test_past_the_point_of_no_return_recovery_finishes(engine: Engine, site: FakeSite, name: str, call: str) -> None:
    """Nobody may be told that everything is as it was when the guest is already gone, or its memory half written."""
    case = CASES[name]
    case.prepare(engine, site)
    fail(site, call)
    with pytest.raises(NotUndoneError, match="stays open") as failed:
        case.run(engine)
    assert failed.value.exit is Exit.NOT_UNDONE
    assert site.world.read().scripts == []
    assert last(engine).state is OpState.OPEN
    assert [o.state for o in engine.sweep()] == [OpState.DONE]
    world = site.world.read()
    assert not any(vm.torn for vm in world.vms.values())
    match name:
        case "stop":
            assert world.vm("a").state is State.OFF
            assert engine.store.promises(engine.facts.name)[0].holds is False
        case "delete":
            assert (world.vms, world.files, world.ifbs, promised(engine)) == ({}, {}, {}, {})
        case "take":
            assert [s.name for s in engine.host.machine.snapshots()] == ["s"]
            assert world.vm("a").state is State.RUNNING
        case _:
            assert not any("spoiled" in text for text in site.world.content("a").values())
            assert world.vm("a").state is State.RUNNING


def test_undoing_goes_backwards_and_is_journaled(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    site.world.fail("set_record")
    with pytest.raises(UndoneError):
        allocate(engine, "a", GROWN)
    steps = last(engine).steps
    done = [s.name for s in steps if s.outcome == "done"]
    assert [s.name for s in steps if s.outcome == "undone"] == done[::-1]
    assert len(done) == 6


@pytest.mark.parametrize("fault", ["undo-allocate:set_vcpus:before=raise", "undo-allocate:set_memory:after=enospc"])
def test_a_failed_undo_is_an_error_of_its_own(engine: Engine, site: FakeSite, fault: str) -> None:
    created(engine, site)
    engine.faults = Faults(f"allocate:set_record:before=raise,{fault}")
    with pytest.raises(NotUndoneError, match="Not undone") as failed:
        allocate(engine, "a", GROWN)
    assert failed.value.exit is Exit.NOT_UNDONE
    row = last(engine)
    assert row.state is OpState.FAILED
    assert [s for s in row.steps if s.outcome.startswith("undo failed")]
    assert site.world.vm("a").allocation.cpu_quota is None, "the other steps are undone all the same"
    engine.faults = Faults("")
    assert allocate(engine, "a", GROWN).state is OpState.DONE


@pytest.mark.parametrize("error", ["DeadlineError", "UnreachableError"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["set_vcpus", "set_balloon", "set_limit", "set_record"])
def test_an_unknown_result_stays_open_until_recovery_has_looked(
    engine: Engine, site: FakeSite, call: str, error: str, after: bool
) -> None:
    created(engine, site)
    before, ledger = seen(site.world), promised(engine)
    site.world.fail(call, error, after=after)
    with pytest.raises(NotUndoneError, match="unknown"):
        allocate(engine, "a", GROWN)
    assert last(engine).state is OpState.OPEN
    (ended,) = engine.sweep()
    if call == "set_record" and after:
        assert ended.state is OpState.DONE
        assert site.world.vm("a").allocation.vcpus == 3
        (promise,) = engine.store.promises(engine.facts.name)
        assert promise.resources.memory == 512 * MIB
        assert promise.holds, "a running VM counts, listed or not"
    else:
        assert ended.state is OpState.UNDONE
        assert seen(site.world) == before
        assert promised(engine) == ledger


def test_the_next_command_on_the_vm_recovers_it_first(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    site.world.fail("set_balloon", "DeadlineError", after=True)
    with pytest.raises(NotUndoneError):
        allocate(engine, "a", GROWN)
    allocate(engine, "a", Change(cpu_weight=7))
    assert site.world.vm("a").allocation.memory == 256 * MIB
    assert engine.store.open_operations(engine.facts.name) == ()


def test_undoing_a_first_allocation_takes_the_record_away_again(engine: Engine, site: FakeSite) -> None:
    """A VM that hvctl never touched is promised nothing after an operation that was undone by recovery."""
    site.world.add_vm("foreign")
    site.world.fail("set_record", "DeadlineError", after=True)
    with pytest.raises(NotUndoneError):
        allocate(engine, "foreign", Change(cpu_quota=50))
    site.world.allocate("foreign", cpu_quota=70)
    assert [o.state for o in engine.sweep()] == [OpState.UNDONE]
    assert site.world.vm("foreign").record is None
    assert promised(engine) == {}


# --- a load that failed


def torn(engine: Engine, site: FakeSite) -> str:
    snapped(engine, site)
    site.world.fail("load_state", "GuestError")
    with pytest.raises(NotUndoneError, match="mixed") as failed:
        snapshots.reset(engine, "a", "s")
    assert failed.value.hint is not None
    assert "--force" in failed.value.hint
    return site.world.vm("a").uuid


def test_a_failed_load_never_continues_the_guest(engine: Engine, site: FakeSite) -> None:
    torn(engine, site)
    assert last(engine).state is OpState.QUARANTINED
    for again in (lambda: snapshots.reset(engine, "a", "s"), lambda: allocate(engine, "a", GROWN),
                  lambda: snapshots.take(engine, "a", "t"), lambda: snapshots.delete(engine, "a", "s"),
                  lambda: verbs.protect(engine, "a", True), lambda: verbs.start(engine, "a"),
                  lambda: allocate(engine, "a", GROWN, dry_run=True)):  # fmt: skip
        with pytest.raises(RefusedError, match="quarantined"):
            again()
    engine.sweep()
    assert site.world.vm("a").state is State.PAUSED
    assert not site.world.vm("a").torn


def test_a_stop_that_failed_does_not_end_the_quarantine(engine: Engine, site: FakeSite) -> None:
    torn(engine, site)
    with pytest.raises(RefusedError, match="paused"):
        stop(engine)
    site.world.fail("destroy")
    with pytest.raises(UndoneError):
        verbs.stop(engine, "a", force=True, seconds=1)
    with pytest.raises(RefusedError, match="quarantined"):
        allocate(engine, "a", GROWN)


def test_a_fresh_process_ends_the_quarantine(engine: Engine, site: FakeSite) -> None:
    torn(engine, site)
    verbs.stop(engine, "a", force=True, seconds=1)
    verbs.start(engine, "a")
    assert allocate(engine, "a", GROWN).state is OpState.DONE


def test_a_quarantined_vm_can_be_deleted(engine: Engine, site: FakeSite) -> None:
    torn(engine, site)
    assert delete(engine).state is OpState.DONE
    assert site.world.read().vms == {}


# --- what changes nothing


def test_a_preview_changes_nothing(engine: Engine, site: FakeSite) -> None:
    snapped(engine, site)
    engine.store.close()
    database = site.folder / "hvctl.db"
    before = site.world.path.read_bytes(), database.read_bytes(), sorted(site.settings.locks_dir.iterdir())
    previews = [
        allocate(engine, "a", GROWN, dry_run=True),
        verbs.create(engine, new_vm("b"), dry_run=True),
        verbs.stop(engine, "a", force=True, seconds=1, dry_run=True),
        verbs.delete(engine, "a", force=True, dry_run=True),
        verbs.protect(engine, "a", True, dry_run=True),
        snapshots.take(engine, "a", "t", dry_run=True),
        snapshots.reset(engine, "a", "s", dry_run=True),
        snapshots.delete(engine, "a", "s", dry_run=True),
    ]
    assert all(p.state is None and p.plan and p.operation is None for p in previews)
    assert allocate(engine, "a", Change(vcpus=1), dry_run=True).plan == ()
    with pytest.raises(RefusedError, match="lacks"):
        verbs.create(engine, new_vm("c", memory=2**50, max_memory=2**50), dry_run=True)
    assert (site.world.path.read_bytes(), database.read_bytes(), sorted(site.settings.locks_dir.iterdir())) == before


def test_nothing_to_do_is_done_without_a_row(engine: Engine, site: FakeSite) -> None:
    grown(engine, site)
    number = last(engine).id
    outcome = allocate(engine, "a", GROWN)
    assert (outcome.state, outcome.plan, outcome.operation) == (OpState.DONE, (), None)
    assert last(engine).id == number


# --- unknown is not gone


def test_nothing_ends_while_libvirt_does_not_answer(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    site.world.fail("set_balloon", "DeadlineError")
    with pytest.raises(NotUndoneError):
        allocate(engine, "a", GROWN)
    ledger = promised(engine)
    site.world.set_libvirt_down(True)
    assert engine.sweep() == []
    for call in (delete, stop, lambda e: allocate(e, "a", GROWN)):
        with pytest.raises(HvctlError) as failed:
            call(engine)
        assert failed.value.exit is Exit.UNREACHABLE
    assert last(engine).state is OpState.OPEN
    assert promised(engine) == ledger
    site.world.set_libvirt_down(False)
    assert [o.state for o in engine.sweep()] == [OpState.UNDONE]


def test_a_vm_that_is_not_listed_keeps_what_it_was_promised(engine: Engine, site: FakeSite) -> None:
    created(engine, site, memory=40 << 30, max_memory=40 << 30)
    site.world.destroy("a")
    site.world.undefine("a")
    assert site.world.read().vms == {}
    assert engine.sweep() == []
    assert len(promised(engine)) == 1
    with pytest.raises(RefusedError, match="memory lacks"):
        verbs.create(engine, new_vm("b", memory=40 << 30, max_memory=40 << 30))


def test_a_recovery_that_cannot_see_the_process_waits(engine: Engine, site: FakeSite) -> None:
    snapped(engine, site)
    site.world.fail("restore_ram")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s")
    site.world.fail("binding", "UnreachableError")
    assert engine.sweep() == []
    assert last(engine).state is OpState.OPEN
    assert site.world.vm("a").state is State.PAUSED
    assert [o.state for o in engine.sweep()] == [OpState.DONE]


@pytest.mark.parametrize(("name", "call"), [("delete", "undefine"), ("stop", "clear")])
@pytest.mark.parametrize("error", ["HvctlError", "DeadlineError"])
def test_a_recovery_that_does_not_get_through_promises_nothing_new(
    engine: Engine, site: FakeSite, name: str, call: str, error: str
) -> None:
    """What failed is closed as that; what got no answer is tried again."""
    case = CASES[name]
    case.prepare(engine, site)
    ledger = promised(engine)
    site.world.fail(call, "DeadlineError")
    with pytest.raises(NotUndoneError):
        case.run(engine)
    site.world.fail(call, error)
    ended = [o.state for o in engine.sweep()]
    assert (ended, last(engine).state) == (
        ([OpState.FAILED], OpState.FAILED) if error == "HvctlError" else ([], OpState.OPEN)
    )
    assert promised(engine) == ledger
    assert [o.state for o in engine.sweep()] == [OpState.DONE] * (error == "DeadlineError")


def test_snapshots_of_a_process_that_ended_go_at_the_next_start(engine: Engine, site: FakeSite) -> None:
    snapped(engine, site)
    site.world.destroy("a")
    assert engine.host.machine.snapshots(hidden=True)
    verbs.start(engine, "a")
    assert not engine.host.machine.snapshots(hidden=True)


# --- locks and marks


def test_a_busy_vm_names_the_operation_that_owns_it(engine: Engine, site: FakeSite) -> None:
    uuid = created(engine, site)
    with vm_lock(site.settings.locks_dir, uuid, 0) as lock:
        lock.mark(4711, Phase.TOUCHING)
        engine.settings = replace(engine.settings, lock_wait=0.0)
        with pytest.raises(BusyError, match="operation 4711") as failed:
            allocate(engine, "a", GROWN)
    assert failed.value.exit is Exit.BUSY
    assert allocate(engine, "a", GROWN).state is OpState.DONE


def test_a_vm_that_is_deleted_leaves_no_lock(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    verbs.delete(engine, "a", force=True)
    assert list(site.settings.locks_dir.iterdir()) == []


def test_recovery_tidies_the_locks_of_operations_that_have_ended(engine: Engine, site: FakeSite) -> None:
    """As of a VM that was deleted when hvctl was killed after the commit; not those of another database."""
    uuid = created(engine, site)
    verbs.delete(engine, "a", force=True)
    for name, number in ((uuid, last(engine).id), (uuid, 4711), ("another", last(engine).id)):
        with vm_lock(site.settings.locks_dir, name, 0) as lock:
            lock.mark(number, Phase.COMMITTED)
        journal.recover(engine)
        left = [p.stem for p in site.settings.locks_dir.iterdir()]
        assert left == ([] if (name, number) == (uuid, last(engine).id) else [name])
        (site.settings.locks_dir / f"{name}.lock").unlink(missing_ok=True)


@pytest.mark.parametrize("damage", ["removed", "emptied", "of another operation", "nonsense"])
def test_a_lost_mark_means_half_done(engine: Engine, site: FakeSite, damage: str) -> None:
    uuid = created(engine, site)
    before = seen(site.world)
    site.world.fail("set_balloon", "DeadlineError", after=True)
    with pytest.raises(NotUndoneError):
        allocate(engine, "a", GROWN)
    path = site.settings.locks_dir / f"{uuid}.lock"
    match damage:
        case "removed":
            path.unlink()
        case "emptied":
            path.write_bytes(b"")
        case "nonsense":
            path.write_bytes(b"\x00{]" * 99)
        case _:
            number = last(engine).id
            other = path.read_text().replace(f'"operation": {number}', f'"operation": {number - 1}')
            path.write_text(other.replace('"phase": "touching"', '"phase": "begun"'))
    assert [o.state for o in engine.sweep()] == [OpState.UNDONE]
    assert seen(site.world) == before


def test_a_lost_mark_of_a_reset_whose_guest_runs_means_not_begun(engine: Engine, site: FakeSite) -> None:
    """Half done it would be paused: repeating the reset would throw away what the guest did since."""
    snapped(engine, site)
    site.world.fail("pause", "DeadlineError")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s")
    mine = site.world.content("a")
    for path in site.settings.locks_dir.iterdir():
        path.unlink()
    assert [o.state for o in engine.sweep()] == [OpState.UNDONE]
    assert site.world.content("a") == mine


def test_bandwidth_of_a_nic_with_foreign_shaping_is_refused(engine: Engine, site: FakeSite) -> None:
    created(engine, site)
    tap = site.world.vm("a").nics[0].tap
    assert tap is not None
    site.world.put_foreign_qdisc(tap)
    with pytest.raises(RefusedError, match="htb"):
        allocate(engine, "a", Change(nics=(NicChange(None, 10**6),)))
    assert site.world.read().taps[tap].foreign == "htb 1: root"
