"""A disk that goes back while its guest uses it: what is refused, how it is classed, and what is left when it fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.adapters.qemu import devicetree
from hvctl.decide.drift import Mend
from hvctl.decide.replug import refuse_replug
from hvctl.decide.scope import classify
from hvctl.engine.operate import Engine
from hvctl.errors import Exit, HvctlError, NotUndoneError, RefusedError, UndoneError
from hvctl.model.operation import OpState
from hvctl.model.reset import AS_USUAL, WHOLE, Coherence, DiskPart, Hooks, Scope
from hvctl.model.snapshot import Range
from hvctl.model.vm import State
from hvctl.operations import archive, doctor
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from unit.enginehost import add_image, last, new_vm
from unit.test_scope import SNAPSHOT, VM

DISK = Scope(False, False, (DiskPart("vda"),))
REPLUG = replace(AS_USUAL, replug=True)


def taken(engine: Engine, site: FakeSite, **behaviour: Any) -> dict[str, str]:
    """A guest that uses its disk, and worked since its snapshot; what it was then."""
    add_image(site)
    verbs.create(engine, new_vm("a"))
    site.world.set_behaviour("a", mounted=["vda"], **behaviour)
    site.world.spoil("a", "first")
    content = site.world.content("a")
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    return content


# --- what is asked


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        (WHOLE, "only disks that go back alone"),
        (Scope(keep=("vdb",)), "only disks that go back alone"),
        (Scope(False, False, (), net=True), "only disks that go back alone"),
        (Scope(False, False, (DiskPart("vdb"),), ranges=(Range(0, 4096),)), "only disks that go back alone"),
        (Scope(False, False, (DiskPart("vdb", Range(0, 4096)),)), "goes back whole"),
        (Scope(False, False, (DiskPart("root"),)), "runs from vda"),
    ],
)
def test_what_is_not_unplugged(scope: Scope, reason: str) -> None:
    refused = refuse_replug(VM, scope, frozenset({"vda"}))
    assert refused is not None
    assert reason in refused.message


def test_only_a_guest_that_runs_lets_go() -> None:
    scope = Scope(False, False, (DiskPart("vdb"),))
    assert refuse_replug(VM, scope, frozenset({"vda"})) is None
    refused = refuse_replug(replace(VM, state=State.PAUSED), scope, frozenset())
    assert refused is not None
    assert "paused" in refused.message


@pytest.mark.parametrize(
    ("mounted", "in_use", "coherence", "reasons"),
    [
        ((), frozenset(), Coherence.COHERENT, []),
        ((), frozenset({"vdb"}), Coherence.COHERENT, ["the guest uses vdb, its programs get I/O errors"]),
        ((), None, Coherence.COHERENT, ["if the guest uses vdb"]),
        (("vdb",), frozenset(), Coherence.CRASH_CONSISTENT, ["the guest used vdb when the snapshot was taken"]),
        (None, frozenset({"vdb"}), Coherence.CRASH_CONSISTENT, ["it is not known whether", "the guest uses vdb"]),
    ],
)
def test_what_the_guest_keeps_of_a_disk_that_went_never_meets_the_one_that_comes(
    mounted: Any, in_use: Any, coherence: Coherence, reasons: list[str]
) -> None:
    scope, snapshot = Scope(False, False, (DiskPart("results"),)), replace(SNAPSHOT, mounted=mounted)
    found, why = classify(VM, snapshot, scope, in_use, replug=True)
    assert found is coherence
    assert len(why) == len(reasons)
    assert all(reason in said for reason, said in zip(reasons, why, strict=True))


def test_a_request_that_the_guest_has_not_answered_is_seen() -> None:
    assert devicetree.refuse_pending("portl[0xae04] = 0x00000000\r\n")
    assert not devicetree.refuse_pending("portl[0xae04] = 0xffffffff\r\n"), "the other machine"
    with pytest.raises(RefusedError, match="in slot 5,"):
        devicetree.refuse_pending("portl[0xae04] = 0x00000120\r\n")


# --- how it goes


def test_older_snapshots_fit_after_it(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site)
    limits = site.world.vm("a").allocation.disks
    snapshots.take(engine, "a", "t")
    with pytest.raises(RefusedError, match="the guest uses vda") as refused:
        snapshots.reset(engine, "a", "s", DISK)
    assert "--replug" in str(refused.value.hint)
    done = snapshots.reset(engine, "a", "s", DISK, REPLUG)
    assert done.result["coherence"] == "crash-consistent"
    assert any("the guest uses vda" in reason for reason in done.reasons)
    assert site.world.content("a")["vda"] == content["vda"] != site.world.content("a")["ram"]
    assert site.world.vm("a").allocation.disks == limits
    for _ in range(2):
        snapshots.reset(engine, "a", "t")
        snapshots.reset(engine, "a", "s")
        assert site.world.content("a") == content
        site.world.spoil("a")
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
        assert site.world.content("a")["vda"] == content["vda"]


def test_its_hooks_run_around_it_and_nobody_asks_whether_it_was_released(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    hooks = Hooks((("sync",),), (("mount", "/data"),))
    done = snapshots.reset(engine, "a", "s", DISK, replace(REPLUG, hooks=hooks))
    assert [s.name for s in done.steps] == [
        "run_in_guest", "prepare_disk", "unplug_disk", "revert_disk", "plug_disk", "run_in_guest", "ready_disk",
    ]  # fmt: skip


def test_a_saved_snapshot_fits_a_new_process_that_has_other_names(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site)
    snapshots.reset(engine, "a", "s", DISK, REPLUG)
    archive.save(engine, "a", "s", "/saved-on-a-fake-host")
    site.world.destroy("a")
    archive.load(engine, "a", "/saved-on-a-fake-host")
    assert site.world.content("a") == content


# --- what fails


def test_a_guest_that_does_not_let_go_keeps_its_disk(engine: Engine, site: FakeSite) -> None:
    taken(engine, site, keeps_disks=True)
    before = site.world.vm("a")
    with pytest.raises(UndoneError, match="did not let go") as refused:
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    assert refused.value.exit == Exit.UNDONE
    assert last(engine).state is OpState.UNDONE
    assert site.world.vm("a").disks == before.disks
    assert site.world.content("a")["vda"].startswith("spoiled")


def test_a_guest_that_lets_go_too_late_gets_its_disk_again_once(engine: Engine, site: FakeSite) -> None:
    taken(engine, site, keeps_disks=True)
    with pytest.raises(UndoneError):
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    worked = site.world.content("a")
    assert doctor.look(engine) == ()
    for change in (lambda: snapshots.reset(engine, "a", "s"), lambda: snapshots.take(engine, "a", "t")):
        with pytest.raises(HvctlError, match="was asked to let go"):
            change()
    assert (site.world.vm("a").state, site.world.content("a")) == (State.RUNNING, worked)
    site.world.set_behaviour("a", keeps_disks=False)
    uuid = site.world.vm("a").uuid
    engine.host.domains.unplug_disk(uuid, "vda")
    assert [(d.mend, d.detail) for d in doctor.look(engine)] == [
        (Mend.PLUG, "its guest let go of vda after the reset that asked for it had ended")
    ]
    doctor.fix(engine, doctor.look(engine), pytest.fail)
    assert (site.world.content("a"), doctor.look(engine)) == (worked, ())
    snapshots.reset(engine, "a", "s", DISK, REPLUG)
    engine.host.domains.unplug_disk(uuid, "vda")
    assert doctor.look(engine) == (), "that is somebody else's wish"


def test_the_root_disk_is_refused_before_anything_is_touched(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    fsinfo = [{"name": "vda1", "mountpoint": "/", "disk": [{"dev": "/dev/vda"}]}]
    site.world.set_behaviour("a", answers={"guest-get-fsinfo": fsinfo})
    before, rows = site.world.vm("a"), last(engine).id
    with pytest.raises(RefusedError, match="runs from vda"):
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    assert (site.world.vm("a").disks, last(engine).id) == (before.disks, rows)


def test_what_cannot_be_plugged_again_now_is_plugged_by_recovery(engine: Engine, site: FakeSite) -> None:
    content = taken(engine, site)
    site.world.fail("plug_disk")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    assert site.world.vm("a").disks == []
    (ended,) = engine.sweep()
    assert ended.state is OpState.DONE
    assert site.world.content("a")["vda"] == content["vda"]
    snapshots.reset(engine, "a", "s")
    assert site.world.content("a") == content


def test_of_several_disks_all_go_back_or_none(engine: Engine, site: FakeSite) -> None:
    site.world.add_vm("a", disks=("one", "two", "three"))
    content = site.world.content("a")
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    worked, scope = site.world.content("a"), Scope(False, False, (DiskPart("two"), DiskPart("vdc")))
    site.world.fail("unplug_disk", "GuestError", nth=2)
    with pytest.raises(UndoneError):
        snapshots.reset(engine, "a", "s", scope, REPLUG)
    assert (site.world.content("a"), len(site.world.vm("a").disks)) == (worked, 3)
    told = snapshots.reset(engine, "a", "s", scope, REPLUG, dry_run=True).result["expected"]
    assert told == {}, "an undone one says nothing of how long it takes"
    snapshots.reset(engine, "a", "s", scope, REPLUG)
    assert site.world.content("a") == worked | {t: content[t] for t in ("vdb", "vdc")}
    assert snapshots.reset(engine, "a", "s", scope, REPLUG, dry_run=True).result["expected"]["resets"] == 1
    assert snapshots.reset(engine, "a", "s", scope, dry_run=True).result["expected"] == {}
    snapshots.reset(engine, "a", "s")
    assert site.world.content("a") == content


@pytest.mark.parametrize("call", ["revert_disk", "rebind"])
def test_whatever_fails_the_guest_has_its_disk_in_the_end(engine: Engine, site: FakeSite, call: str) -> None:
    content = taken(engine, site)
    worked = site.world.content("a")["vda"]
    site.world.fail(call)
    with pytest.raises(HvctlError):
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    (ended,) = engine.sweep()
    undone = call == "revert_disk"
    assert ended.state is (OpState.UNDONE if undone else OpState.DONE)
    assert site.world.content("a")["vda"] == (worked if undone else content["vda"])
    snapshots.reset(engine, "a", "s")
    assert site.world.content("a") == content


def test_a_vm_that_ends_in_between_boots_with_its_disk(engine: Engine, site: FakeSite) -> None:
    taken(engine, site)
    site.world.fail("plug_disk")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s", DISK, REPLUG)
    site.world.destroy("a")
    (ended,) = engine.sweep()
    assert ended.state is OpState.FAILED
    assert [d.target for d in site.world.vm("a").disks] == ["vda"]
    verbs.start(engine, "a")
    assert site.world.vm("a").state is State.RUNNING
