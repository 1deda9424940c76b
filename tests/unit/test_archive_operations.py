"""Save and load on the fake host: what is saved comes back after the host, what does not fit is refused, and what goes
wrong in between leaves the VM off with the disks that it had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.engine import hands
from hvctl.engine.archivehands import archive_hand
from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.errors import (
    HvctlError,
    NotFoundError,
    NotUndoneError,
    RefusedError,
    UndoneError,
    UnreachableError,
    UsageError,
)
from hvctl.model.allocation import Change
from hvctl.model.archivesteps import ReleaseDisks, ReturnDisks
from hvctl.model.operation import OpState, Outcome
from hvctl.model.vm import Accel, State
from hvctl.operations import archive
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from unit.enginehost import GROWN, MIB, add_image, last, new_vm, promised, seen

SAVED = "/saved-on-a-fake-host"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes by itself in a fake guest, so nobody waits for it."""
    monkeypatch.setattr(hands, "ONLINE_SECONDS", 0.0)
    monkeypatch.setattr(hands, "AGENT_SECONDS", 0.2)
    monkeypatch.setattr("hvctl.decide.reset.AGENT_SECONDS", 0.2)


def save(engine: Engine, name: str = "s", to: str = SAVED) -> Outcome:
    return archive.save(engine, "a", name, to)


def load(engine: Engine, **options: Any) -> Outcome:
    return archive.load(engine, "a", SAVED, **options)


@pytest.fixture
def then(engine: Engine, site: FakeSite) -> dict[str, str]:
    """A VM with a snapshot that was saved and a guest that worked on; what the snapshot is."""
    add_image(site)
    verbs.create(engine, new_vm("a"))
    allocate(engine, "a", Change(vcpus=2))
    site.world.spoil("a", "then")
    content = site.world.content("a")
    snapshots.take(engine, "a", "s")
    save(engine)
    site.world.spoil("a", "since")
    return content


@pytest.fixture
def off(engine: Engine, site: FakeSite, then: dict[str, str]) -> dict[str, str]:
    """The host was started anew."""
    site.world.reboot_host()
    return then


def test_a_vm_comes_back_after_its_host(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    assert engine.host.machine.snapshots() == []
    done = load(engine)
    assert site.world.content("a") == off
    vm = site.world.vm("a")
    assert (vm.state, vm.torn, len(vm.online)) == (State.RUNNING, False, 2)
    assert done.result["warmth"] == "cold"
    assert done.result["process"]["pid"] == vm.process.pid  # type: ignore[union-attr]
    (kept,) = engine.host.machine.snapshots()
    assert (kept.name, kept.binding.process) == ("s", vm.process)

    site.world.spoil("a", "later")
    assert snapshots.reset(engine, "a", "s").result["warmth"] == "warm"
    assert site.world.content("a") == off


def test_the_guest_runs_while_it_is_saved(engine: Engine, site: FakeSite, then: dict[str, str]) -> None:
    before = site.world.vm("a")
    done = save(engine, to="/another")
    assert "pause" not in {s.name for s in done.steps}
    assert site.world.vm("a") == before
    assert done.result["compressed"] > 0


def test_a_place_in_memory_is_told(
    engine: Engine, site: FakeSite, then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "filesystem", lambda _: "ext4")
    assert archive.save(engine, "a", "s", "/another", dry_run=True).reasons == ()
    monkeypatch.setattr(archive, "filesystem", lambda _: "tmpfs")
    (why,) = archive.save(engine, "a", "s", "/another", dry_run=True).reasons
    assert why == "on tmpfs: it does not outlive a restart of the host"


def test_it_may_get_another_name(engine: Engine, off: dict[str, str]) -> None:
    load(engine, name="again")
    assert [s.name for s in engine.host.machine.snapshots()] == ["again"]
    with pytest.raises(UsageError):
        load(engine, name="../x")


def test_it_is_promised_what_it_had(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    allocate(engine, "a", GROWN)
    assert site.world.vm("a").record.allocation.vcpus == 3  # type: ignore[union-attr]
    load(engine)
    (promise,) = engine.store.promises(engine.facts.name)
    assert promise.holds
    record = site.world.vm("a").record
    assert record is not None
    assert (record.allocation.vcpus, record.allocation.memory) == (2, 256 * MIB)
    # What is no part of the guest stays as it was promised since.
    assert record.allocation.cpu_quota == GROWN.cpu_quota
    assert site.world.read().taps[next(iter(site.world.read().taps))].inbound == 10**7


def test_another_disk_content_is_thrown_away_and_nothing_is_kept(
    engine: Engine, site: FakeSite, off: dict[str, str]
) -> None:
    site.world.start("a")
    site.world.spoil("a", "booted from its disks")
    site.world.destroy("a")
    before = set(site.world.read().files)
    load(engine)
    added = set(site.world.read().files) - before
    assert {p.rpartition("/")[2] for p in added} == {"ram", "state", "manifest.json"}
    assert site.world.content("a") == off


def test_an_older_snapshot_of_an_ended_process_goes(engine: Engine, site: FakeSite, then: dict[str, str]) -> None:
    snapshots.take(engine, "a", "t")
    site.world.destroy("a")
    load(engine)
    assert [s.name for s in engine.host.machine.snapshots()] == ["s"]
    assert site.world.content("a") == then


Spoil = Callable[[Engine, FakeSite], Any]


def _elsewhere(engine: Engine, site: FakeSite) -> None:
    """The VM was deleted, and made again under its name."""
    verbs.delete(engine, "a", force=True)
    verbs.create(engine, new_vm("a", start=False))


def _facts(version: str) -> Spoil:
    def change(engine: Engine, site: FakeSite) -> None:
        engine.facts = replace(engine.facts, hypervisor_version=version)

    return change


def _file(name: str, text: str) -> Spoil:
    def change(engine: Engine, site: FakeSite) -> None:
        with engine.host.archives._file.change() as world:  # type: ignore[attr-defined]
            world.files[f"{SAVED}/{name}"].part.text = text

    return change


def _without(name: str) -> Spoil:
    def change(engine: Engine, site: FakeSite) -> None:
        with engine.host.archives._file.change() as world:  # type: ignore[attr-defined]
            del world.files[f"{SAVED}/{name}"]

    return change


def _vm(change: Callable[[Any], Any]) -> Spoil:
    def act(engine: Engine, site: FakeSite) -> None:
        with engine.host.archives._file.change() as world:  # type: ignore[attr-defined]
            change(world.vm("a"))

    return act


REFUSED: dict[str, tuple[Spoil, str]] = {
    "running": (lambda e, s: s.world.start("a"), "is off"),
    "paused": (lambda e, s: (s.world.start("a"), s.world.pause("a")), "is off"),
    "protected": (lambda e, s: verbs.protect(e, "a", True), "protected"),
    "another VM": (_elsewhere, "of another VM"),
    "another QEMU": (_facts("10.0.2"), "QEMU"),
    "ram damaged": (_file("ram.zst", "00"), "ram.zst"),
    "disk damaged": (_file("disk-vda.qcow2", "x"), "disk-vda"),
    "manifest damaged": (_file("manifest.json", "{"), "damaged"),
    "state gone": (_without("state.qcow2"), "state.qcow2"),
    "no room": (lambda e, s: s.world.set_room(10), "no room"),
    "other memory": (_vm(lambda vm: setattr(vm, "max_memory", 2048 * MIB)), "memory at most"),
    "other accelerator": (_vm(lambda vm: setattr(vm, "accel", Accel.KVM)), "kvm"),
    "other disks": (_vm(lambda vm: vm.disks.append(replace(vm.disks[0], target="vdb", path="/x"))), "disk vdb"),
    "not adopted": (_vm(lambda vm: setattr(vm, "missing", ["hvctl's monitor"])), "lacks"),
    "no capacity": (lambda e, s: setattr(e, "facts", replace(e.facts, memory=1 << 30)), "memory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(
    engine: Engine, site: FakeSite, off: dict[str, str], case: str
) -> None:
    spoil, why = REFUSED[case]
    spoil(engine, site)
    before, promises = seen(site.world), promised(engine)
    with pytest.raises(RefusedError, match=why) as refused:
        load(engine)
    assert refused.value.hint
    assert (seen(site.world), promised(engine)) == (before, promises)
    assert engine.store.open_operations(engine.facts.name) == ()


def test_what_is_not_there_is_not_found(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    with pytest.raises(NotFoundError):
        archive.load(engine, "a", "/none-of-these")
    site.world.start("a")
    with pytest.raises(NotFoundError, match="no snapshot"):
        save(engine, "none", "/another")


def test_another_machine_shows_only_when_it_is_there(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    """A device that the definition gives it since: the process is ended, the disks are those from before."""
    with engine.host.archives._file.change() as world:  # type: ignore[attr-defined]
        world.vm("a").has_balloon = False
    before, promises = seen(site.world), promised(engine)
    with pytest.raises(UndoneError, match="balloon"):
        load(engine)
    assert (seen(site.world), promised(engine)) == (before, promises)


CALLS = [
    *("drop", "set_vcpus", "import_snapshot", "place_disks", "start", "hardware", "attach", "publish"),
    *("restore_ram", "load_state", "audit"),
]


@pytest.fixture
def smaller(engine: Engine, site: FakeSite, then: dict[str, str]) -> dict[str, str]:
    """A VM that was given less since, and whose process has ended with its snapshots there."""
    allocate(engine, "a", Change(vcpus=1))
    site.world.destroy("a")
    return then


@pytest.mark.parametrize("error", ["HvctlError", "RefusedError", "GuestError", "enospc"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_leaves_the_vm_off_with_its_disks(
    engine: Engine, site: FakeSite, smaller: dict[str, str], call: str, error: str
) -> None:
    before, promises = seen(site.world), promised(engine)
    site.world.fail(call, error)
    with pytest.raises(UndoneError):
        load(engine)
    now = seen(site.world)
    assert (now["vms"], promised(engine), now["taps"], now["ifbs"]) == (before["vms"], promises, {}, {})
    # The snapshots of the ended process went, as they do at every start.
    gone = {p: f for p, f in before["files"].items() if p not in now["files"]}
    assert {p.rpartition("/")[2] for p in gone} <= {"ram", "state", "manifest.json"}
    assert {p: t for p, (t, _) in now["files"].items()} == {
        p: t for p, (t, _) in before["files"].items() if p not in gone
    }
    load(engine)
    assert site.world.content("a") == smaller


@pytest.mark.parametrize("call", ["hardware", "attach", "restore_ram", "load_state", "audit", "kept_disks"])
def test_a_process_that_dies_in_between_is_recovered(
    engine: Engine, site: FakeSite, off: dict[str, str], call: str
) -> None:
    before, promises = seen(site.world), promised(engine)
    site.world.script(call, outside="destroy")
    with pytest.raises(NotUndoneError, match="stays open"):
        load(engine)
    (ended,) = engine.sweep()
    assert ended.state is OpState.UNDONE
    assert (seen(site.world), promised(engine)) == (before, promises)
    load(engine)
    assert site.world.content("a") == off


@pytest.mark.parametrize("call", ["import_snapshot", "place_disks", "start", "load_state", "restore_ram"])
def test_an_answer_that_does_not_come_is_recovered(
    engine: Engine, site: FakeSite, off: dict[str, str], call: str
) -> None:
    before, promises = seen(site.world), promised(engine)
    site.world.fail(call, "DeadlineError", after=True)
    with pytest.raises(NotUndoneError, match="stays open"):
        load(engine)
    (ended,) = engine.sweep()
    assert ended.state is OpState.UNDONE
    assert (seen(site.world), promised(engine)) == (before, promises)


def test_disks_of_a_vm_that_somebody_started_are_not_replaced(
    engine: Engine, site: FakeSite, off: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = engine.host.archives.import_snapshot

    def and_then(*args: Any) -> int:
        site.world.start("a")
        return imported(*args)

    monkeypatch.setattr(engine.host.archives, "import_snapshot", and_then)
    with pytest.raises(UndoneError, match="its disks are in use"):
        load(engine)
    vm = site.world.vm("a")
    assert (vm.state, engine.host.storage.kept_disks(vm.uuid)) == (State.RUNNING, None)


@pytest.mark.parametrize("active", [True, False])
def test_disks_from_before_a_load_come_back_only_without_a_process_and_go_only_with_it(
    engine: Engine, site: FakeSite, off: dict[str, str], monkeypatch: pytest.MonkeyPatch, active: bool
) -> None:
    """Taken back under a QEMU they would be two guests' at once; given up without one, nobody has seen the load."""
    done: list[str] = []
    for name in ("return_disks", "release_disks"):
        monkeypatch.setattr(engine.host.storage, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(engine.host.storage, "kept_disks", lambda _: "load")
    if active:
        site.world.start("a")
    uuid = site.world.vm("a").uuid
    for step in (ReturnDisks(uuid, "load", ()), ReleaseDisks(uuid, "load", ())):
        with contextlib.suppress(RefusedError, UnreachableError):
            archive_hand(engine.host, step, None)
    assert done == (["release_disks"] if active else ["return_disks"])


def test_somebody_who_starts_it_meanwhile_is_not_disturbed(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    """Whose disks it has nobody can say for certain, so it is quarantined and nothing is ended."""
    placed = engine.host.storage.place_disks

    def and_then(*args: Any) -> None:
        placed(*args)
        site.world.start("a")

    engine.host.storage.place_disks = and_then  # type: ignore[method-assign]
    with pytest.raises(NotUndoneError, match="somebody else"):
        load(engine)
    process = site.world.vm("a").process
    (ended,) = engine.sweep()
    assert ended.state is OpState.QUARANTINED
    assert site.world.vm("a").process == process


def test_a_guest_that_somebody_resumed_half_way_is_quarantined(
    engine: Engine, site: FakeSite, off: dict[str, str]
) -> None:
    site.world.fail("load_state", "DeadlineError")
    with pytest.raises(NotUndoneError):
        load(engine)
    site.world.resume("a")
    (ended,) = engine.sweep()
    assert ended.state is OpState.QUARANTINED
    assert ended.reason is not None
    assert ".old" in ended.reason
    old = [p for p in site.world.read().files if p.endswith(".old")]
    assert len(old) == 1
    with pytest.raises(RefusedError, match="quarantined"):
        allocate(engine, "a", GROWN)
    verbs.stop(engine, "a", force=True, seconds=1)
    verbs.start(engine, "a")
    allocate(engine, "a", GROWN)


def test_a_host_that_goes_down_in_between_keeps_the_disks(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    """The mark is lost with the host's memory."""
    files = seen(site.world)["files"]
    site.world.fail("load_state", "DeadlineError")
    with pytest.raises(NotUndoneError):
        load(engine)
    _lose_marks(engine, site)
    site.world.reboot_host()
    (ended,) = engine.sweep()
    assert ended.state is OpState.UNDONE
    assert seen(site.world)["files"] == files


def test_a_host_that_goes_down_after_the_commit_does_not_take_work_away(
    engine: Engine, site: FakeSite, off: dict[str, str]
) -> None:
    site.world.fail("resume", "DeadlineError", after=True)
    with pytest.raises(NotUndoneError):
        load(engine)
    site.world.spoil("a", "new work")
    disk = site.world.content("a")["vda"]
    _lose_marks(engine, site)
    site.world.reboot_host()
    engine.sweep()
    assert site.world.content("a")["vda"] == disk
    assert engine.store.open_operations(engine.facts.name) == ()


def test_after_the_commit_a_lost_mark_does_not_end_the_guest(
    engine: Engine, site: FakeSite, off: dict[str, str]
) -> None:
    site.world.fail("set_record", "DeadlineError")
    with pytest.raises(NotUndoneError):
        load(engine)
    site.world.spoil("a", "new work")
    mine = site.world.content("a")
    _lose_marks(engine, site)
    (ended,) = engine.sweep()
    assert ended.state is OpState.DONE
    assert site.world.content("a") == mine
    record = site.world.vm("a").record
    assert record is not None
    assert record.allocation.vcpus == 2


def _lose_marks(engine: Engine, site: FakeSite) -> None:
    for lock in site.settings.locks_dir.glob("*.lock"):
        with vm_lock(site.settings.locks_dir, lock.stem, 0) as held:
            held.clear()


def test_a_dry_run_does_nothing(engine: Engine, site: FakeSite, off: dict[str, str]) -> None:
    before = seen(site.world)
    shown = load(engine, dry_run=True)
    assert (shown.state, seen(site.world)) == (None, before)
    assert {"place_disks", "bind_snapshot", "load_state"} <= {step for step, _ in shown.plan}
    site.world.start("a")
    snapshots.take(engine, "a", "s")
    before = seen(site.world)
    assert archive.save(engine, "a", "s", "/another", dry_run=True).state is None
    assert seen(site.world) == before


# --- saving


@pytest.mark.parametrize("call", ["write_archive", "publish_archive"])
@pytest.mark.parametrize(
    ("error", "after"), [("HvctlError", False), ("enospc", False), ("DeadlineError", False), ("DeadlineError", True)]
)
def test_a_save_that_fails_leaves_nothing(
    engine: Engine, site: FakeSite, then: dict[str, str], call: str, error: str, after: bool
) -> None:
    before = seen(site.world)
    site.world.fail(call, error, after=after)
    with pytest.raises(HvctlError):
        save(engine, to="/another")
    engine.sweep()
    files = seen(site.world)["files"]
    if after and call == "publish_archive":
        assert engine.host.archives.read("/another").snapshot.name == "s"
        assert last(engine).state is OpState.DONE
    else:
        assert files == before["files"]
    assert {p: files[p] for p in before["files"]} == before["files"]
    assert site.world.vm("a").state is State.RUNNING


SAVES: dict[str, tuple[Spoil, str]] = {
    "there already": (lambda e, s: None, "there already"),
    "off": (lambda e, s: s.world.destroy("a"), "QEMU process"),
    "another process": (lambda e, s: (s.world.destroy("a"), s.world.start("a")), "another one"),
    "plugged": (lambda e, s: s.world.plug("a", "rng"), "rng"),
}


@pytest.mark.parametrize("case", SAVES)
def test_what_cannot_be_saved_is_refused(engine: Engine, site: FakeSite, then: dict[str, str], case: str) -> None:
    spoil, why = SAVES[case]
    spoil(engine, site)
    before = seen(site.world)
    with pytest.raises(RefusedError, match=why):
        save(engine)
    assert seen(site.world) == before


def test_without_room_it_is_refused_with_numbers(engine: Engine, site: FakeSite, then: dict[str, str]) -> None:
    site.world.set_room(10)
    with pytest.raises(RefusedError, match=r"512 B of / *.*10 B are free"):
        save(engine, to="/another")


def test_a_folder_is_named_in_full(engine: Engine, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert archive.absolute("s") == str(tmp_path.resolve() / "s")
    for wrong in ("/", "none/s", "s\n"):
        with pytest.raises(UsageError):
            archive.absolute(wrong)


def test_the_difference_of_two_snapshots(engine: Engine, site: FakeSite, then: dict[str, str]) -> None:
    snapshots.take(engine, "a", "t")
    found = archive.difference(site.settings, "a", "s", "t")
    assert found.ram[0].bytes > 0
    assert [d.target for d in found.disks] == ["vda"]
    same = archive.difference(site.settings, "a", "t", "t")
    assert (same.ram[0].bytes, same.disks[0].bytes) == (0, 0)
    with pytest.raises(NotFoundError):
        archive.difference(site.settings, "a", "s", "none")
