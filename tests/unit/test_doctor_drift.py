"""doctor on the fake host: each way in which promises and what is can come apart is found, and mended or reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.command import FakeSite

from hvctl.adapters.fake import FakeWorld
from hvctl.adapters.fake.state import Part
from hvctl.decide.drift import Mend
from hvctl.engine.lock import vm_lock
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
from hvctl.errors import NotUndoneError
from hvctl.model.allocation import Allocation, Change, NicChange, NicLimit, Record
from hvctl.model.finding import Health
from hvctl.model.operation import Kind, Operation, OpState
from hvctl.model.vm import State
from hvctl.operations import doctor
from hvctl.operations import snapshot as snapshots
from hvctl.operations import vm as verbs
from hvctl.operations.allocate import allocate
from hvctl.settings import Settings
from hvctl.units import format_size
from unit.enginehost import GROWN, MIB, add_image, last, new_vm, promised, seen


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GONE_SECONDS", 0.0)


@pytest.fixture
def vm(engine: Engine, site: FakeSite) -> str:
    """A running VM with limits in force; its uuid."""
    add_image(site)
    uuid = verbs.create(engine, new_vm("a")).vm_uuid
    allocate(engine, "a", GROWN)
    return uuid


def found(engine: Engine) -> list[tuple[str, Mend]]:
    return [(d.vm_name, d.mend) for d in doctor.look(engine)]


def fixed(engine: Engine) -> list[str]:
    """What fixing said; what it should mend is mended."""
    said: list[str] = []
    doctor.fix(engine, doctor.look(engine), said.append)
    return said


def tap(site: FakeSite) -> str:
    name = site.world.vm("a").nics[0].tap
    assert name is not None
    return name


def test_nothing_has_drifted(engine: Engine, site: FakeSite, vm: str) -> None:
    """Neither on a fresh VM, a stopped one, nor on one that hvctl was never asked about."""
    verbs.create(engine, new_vm("fresh"))
    verbs.create(engine, new_vm("off", start=False))
    site.world.add_vm("foreign")
    before = seen(site.world)
    assert found(engine) == []
    assert [f.status for f in doctor.as_findings(doctor.look(engine))] == [Health.OK]
    assert seen(site.world) == before


@pytest.mark.parametrize("drift", ["limit", "quota", "memory", "vcpus", "iops"])
def test_what_is_not_in_force_any_more_is_put_in_force(engine: Engine, site: FakeSite, vm: str, drift: str) -> None:
    before = seen(site.world)
    match drift:
        case "limit":
            site.world.drop_qdisc(tap(site))
        case "quota":
            site.world.allocate("a", cpu_quota=None)
        case "memory":
            site.world.allocate("a", memory=300 * MIB)
        case "iops":
            disks = site.world.vm("a").allocation.disks
            site.world.allocate("a", disks=tuple(replace(d, iops=None) for d in disks))
        case "vcpus":
            call = {"vcpus": [{"logical-id": 2, "online": False}]}
            engine.host.domains.agent(vm, "guest-set-vcpus", call, 1.0)
    assert found(engine) == [("a", Mend.REALLOCATE)]
    assert "differ" in doctor.look(engine)[0].detail
    assert fixed(engine) == []
    assert found(engine) == []
    assert seen(site.world) == before


def test_a_record_that_the_domain_lost_comes_from_the_database(engine: Engine, site: FakeSite, vm: str) -> None:
    record = site.world.vm("a").record
    engine.host.domains.set_record(vm, None)
    assert (found(engine), fixed(engine)) == ([("a", Mend.RECORD)], [])
    assert site.world.vm("a").record == record
    assert found(engine) == []


def test_a_record_that_somebody_rewrote_is_the_databases_again(engine: Engine, site: FakeSite, vm: str) -> None:
    record = site.world.vm("a").record
    assert record is not None
    engine.host.domains.set_record(vm, replace(record, protected=True))
    assert (found(engine), fixed(engine)) == ([("a", Mend.RECORD)], [])
    assert site.world.vm("a").record == record


def test_a_lost_database_learns_from_the_domains(engine: Engine, site: FakeSite, vm: str, migrated: Path) -> None:
    before = promised(engine)
    engine.store.close()
    (site.folder / "hvctl.db").write_bytes(migrated.read_bytes())
    assert promised(engine) == {}
    assert (found(engine), fixed(engine)) == ([("a", Mend.RECORD)], [])
    assert promised(engine) == before


def test_vms_of_another_database_are_left_alone(engine: Engine, site: FakeSite, vm: str) -> None:
    """It promised them, and may be at them right now: its locks may lie elsewhere."""
    record = Record(Allocation(2, 256 * MIB, cpu_quota=80))
    uuid = site.world.add_vm("theirs", record=record)
    engine.host.network.set_limit(str(site.world.vm("theirs").nics[0].tap), NicLimit("52:54:00:00:00:01", 10**7), uuid)
    for state in ("running", "off"):
        before = seen(site.world)
        assert found(engine) == [], state
        assert fixed(engine) == []
        assert (seen(site.world), list(promised(engine))) == (before, [vm])
        site.world.destroy("theirs")


def lost_tags(engine: Engine, site: FakeSite) -> tuple[set[str], set[str]]:
    """Two snapshots are taken, and their RAM goes with the host: the tags they left, and those that others made."""
    snapshots.take(engine, "a", "one")
    site.world.spoil("a")
    snapshots.take(engine, "a", "two")
    site.world.reboot_host()
    with site.world._file.change() as world:
        overlay = world.files[str(world.vm("a").disks[0].path)]
        ours = set(overlay.tags)
        overlay.tags["somebody's"] = Part("x" * 100)
    assert len(ours) == 2
    return ours, {"somebody's"}


def tags(site: FakeSite) -> set[str]:
    return set(site.world.read().files[str(site.world.vm("a").disks[0].path)].tags)


@pytest.mark.parametrize("running", [False, True])
def test_tags_of_snapshots_that_a_host_restart_took_go(engine: Engine, site: FakeSite, vm: str, running: bool) -> None:
    _, others = lost_tags(engine, site)
    if running:
        verbs.start(engine, "a")
        snapshots.take(engine, "a", "new")
        (new,) = engine.host.machine.snapshots()
        others.add(new.tag)
    (drift,) = (d for d in doctor.look(engine) if d.mend is Mend.DROP_TAGS)
    held = sum(len(p.text) for t, p in site.world.read().files[str(site.world.vm("a").disks[0].path)].tags.items()
               if t not in others)  # fmt: skip
    assert f"2 snapshots whose RAM is gone are still in its disks and hold {format_size(held)}" in drift.detail
    assert fixed(engine) == []
    assert tags(site) == others
    assert found(engine) == []
    assert last(engine).kind is Kind.SNAPSHOT_DELETE


def test_tags_are_left_while_somebody_is_at_the_vm(engine: Engine, site: FakeSite, vm: str) -> None:
    lost_tags(engine, site)
    engine.store.open_operation(
        vm_uuid=vm, vm_name="a", host=engine.facts.name, kind=Kind.SNAPSHOT_LOAD, request={}, before={},
        who="x", boot_id="b",
    )  # fmt: skip
    assert Mend.DROP_TAGS not in {m for _, m in found(engine)}


def test_a_vm_that_stays_away_is_forgotten_and_its_devices_go(engine: Engine, site: FakeSite, vm: str) -> None:
    snapshots.take(engine, "a", "s")
    site.world.destroy("a")
    site.world.undefine("a")
    assert {m for _, m in found(engine)} == {Mend.FORGET, Mend.CLEAR_DEVICES, Mend.DROP_SNAPSHOTS, Mend.NOTHING}
    said = fixed(engine)
    assert len(said) == 1
    assert "looking again" in said[0]
    assert promised(engine) == {}
    world = site.world.read()
    assert world.ifbs == {}
    assert engine.host.machine.snapshots() == []
    (drift,) = doctor.look(engine)
    assert (drift.vm_name, drift.mend) == ("a", Mend.NOTHING), "its folder is for a person"
    assert drift.remedy.endswith(f"nobody wants its disks: rm -r {site.settings.vms_dir / vm}")
    assert world.folders != {}
    engine.host.storage.place_disks(vm, "load-1", [])
    assert len(found(engine)) == 1, "whatever lies in it"
    engine.store.open_operation(
        vm_uuid=vm, vm_name="a", host=engine.facts.name, kind=Kind.CREATE, request={}, before={}, who="x", boot_id="b",
    )  # fmt: skip
    with vm_lock(site.settings.locks_dir, vm, 0):
        assert found(engine) == [], "somebody is at it"


def test_a_vm_that_is_back_at_the_second_look_keeps_everything(
    engine: Engine, site: FakeSite, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing may be short for a moment, while libvirt restarts: only two of them, apart, tell that a VM is gone."""
    world = site.world.read()
    whole = site.world.path.read_bytes()
    site.world.destroy("a")
    site.world.undefine("a")
    drifts = doctor.look(engine)
    monkeypatch.setattr("time.sleep", lambda _: site.world.path.write_bytes(whole))
    doctor.fix(engine, drifts, lambda _: None)
    assert site.world.read().ifbs == world.ifbs
    assert list(promised(engine)) == [vm]


def test_nothing_is_forgotten_while_libvirt_does_not_answer(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.destroy("a")
    site.world.undefine("a")
    drifts = doctor.look(engine)
    site.world.set_libvirt_down(True)
    with pytest.raises(Exception, match="does not answer"):
        doctor.fix(engine, drifts, lambda _: None)
    assert list(promised(engine)) == [vm]


def test_devices_and_snapshots_of_an_ended_process(engine: Engine, site: FakeSite, vm: str) -> None:
    snapshots.take(engine, "a", "s")
    site.world.destroy("a")
    assert sorted(found(engine)) == [("a", Mend.CLEAR_DEVICES), ("a", Mend.DROP_SNAPSHOTS)]
    assert fixed(engine) == []
    assert found(engine) == []
    assert site.world.read().ifbs == {}
    assert engine.host.machine.snapshots() == []
    assert list(promised(engine)) == [vm], "a VM that is off is promised what it had"
    verbs.start(engine, "a")
    assert site.world.read().taps[tap(site)].inbound == 10**7


def test_snapshots_of_the_process_that_runs_are_kept(engine: Engine, site: FakeSite, vm: str) -> None:
    snapshots.take(engine, "a", "old")
    site.world.destroy("a")
    site.world.start("a")
    engine.sweep()
    snapshots.take(engine, "a", "new")
    assert ("a", Mend.DROP_SNAPSHOTS) in found(engine)
    fixed(engine)
    assert [s.name for s in engine.host.machine.snapshots()] == ["new"]
    assert site.world.read().taps[tap(site)].inbound == 10**7, "a start by others has no limits: those are mended too"


def test_a_dead_owners_operation_is_recovered(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.fail("set_cpu_quota", "DeadlineError")
    with pytest.raises(NotUndoneError):
        allocate(engine, "a", Change(cpu_quota=10))
    assert ("a", Mend.RECOVER) in found(engine)
    fixed(engine)
    assert last(engine).state is OpState.UNDONE
    assert found(engine) == []


def test_an_operation_that_is_under_way_is_no_drift(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.fail("set_cpu_quota", "DeadlineError")
    with pytest.raises(NotUndoneError):
        allocate(engine, "a", Change(cpu_quota=10))
    with vm_lock(site.settings.locks_dir, vm, 0):
        assert Mend.RECOVER not in {m for _, m in found(engine)}


def test_foreign_shaping_is_reported_and_left_alone(engine: Engine, site: FakeSite, vm: str) -> None:
    allocate(engine, "a", Change(nics=(NicChange(None, None, None),)))
    site.world.put_foreign_qdisc(tap(site))
    (drift,) = doctor.look(engine)
    assert (drift.mend, "htb 1: root" in drift.detail) == (Mend.NOTHING, True)
    assert drift.remedy == f"tc qdisc show dev {tap(site)}"
    fixed(engine)
    assert site.world.read().taps[tap(site)].foreign == "htb 1: root"


def test_a_guest_that_an_error_paused_is_reported(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.pause("a", "io-error")
    (drift,) = doctor.look(engine)
    assert (drift.mend, drift.detail) == (Mend.NOTHING, "paused: io-error")
    fixed(engine)
    assert site.world.vm("a").state is State.PAUSED
    site.world.resume("a")
    site.world.pause("a")
    assert found(engine) == [], "who pauses a VM knows it"
    site.world.resume("a")
    site.world.pause("a", "starting-up")
    assert found(engine) == [], "that ends by itself"
    site.world.add_vm("foreign")
    site.world.pause("foreign", "unknown")
    assert found(engine) == [], "another database may have it paused for a reset"


def test_a_guest_of_two_moments_is_not_to_be_resumed(engine: Engine, site: FakeSite, vm: str) -> None:
    """Neither while its reset is open, nor when it is quarantined: virsh would let it run."""
    snapshots.take(engine, "a", "s")
    site.world.spoil("a")
    site.world.fail("load_state", "DeadlineError")
    with pytest.raises(NotUndoneError):
        snapshots.reset(engine, "a", "s")
    site.world.pause("a", "unknown")
    assert [(d.mend, d.remedy) for d in doctor.look(engine)] == [(Mend.RECOVER, "hvctl recover")]
    site.world.fail("load_state", "GuestError")
    engine.sweep()
    (drift,) = doctor.look(engine)
    assert (drift.mend, drift.remedy) == (Mend.NOTHING, "hvctl vm stop a --force, then start it")
    assert drift.detail.startswith(f"quarantined: operation {last(engine).id}: ")


def test_a_look_asks_the_journal_no_oftener_where_there_are_more_vms(
    engine: Engine, site: FakeSite, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    operations = engine.store.operations

    def counted(*args: Any, **wanted: Any) -> tuple[Operation, ...]:
        asked.append((args, wanted))
        return operations(*args, **wanted)

    monkeypatch.setattr(engine.store, "operations", counted)
    doctor.look(engine)
    once = len(asked)
    site.world.add_vms(f"vm-{i}" for i in range(5))
    asked.clear()
    doctor.look(engine)
    assert len(asked) == once


def test_a_mending_that_fails_hides_no_other(engine: Engine, site: FakeSite, vm: str) -> None:
    verbs.create(engine, new_vm("b"))
    site.world.allocate("a", cpu_quota=None)
    site.world.allocate("b", cpu_weight=7)
    site.world.fail("set_cpu_quota")
    said = fixed(engine)
    assert len(said) == 1
    assert said[0].startswith("a: not mended: ")
    assert found(engine) == [("a", Mend.REALLOCATE)]
    assert site.world.vm("b").allocation.cpu_weight is None
    assert fixed(engine) == []


def test_findings_say_what_is_lost_and_what_helps(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.allocate("a", cpu_quota=None)
    (finding,) = doctor.as_findings(doctor.look(engine))
    assert (finding.name, finding.status, finding.fixable) == ("drift:a", Health.DEGRADED, True)
    assert finding.detail == "promised and in force differ: cpu_quota 150, is None"
    assert finding.remedy == "hvctl doctor --fix"


def test_a_change_after_the_metadata_was_lost_keeps_what_the_database_knows(tmp_path: Path) -> None:
    """Labels, protection and image are not forgotten because somebody spoiled the domain's metadata."""
    world = FakeWorld(tmp_path / "world.json")
    record = Record(Allocation(1, 256 << 20), image="micro", labels={"k": "v"}, protected=True)
    world.add_vm("a", record=record)
    settings = Settings(uri=world.uri, state_dir=str(tmp_path), run_dir=str(tmp_path), ram_dir=str(tmp_path))
    with open_engine(settings) as engine:
        allocate(engine, "a", Change(vcpus=2))
        engine.host.domains.set_record(world.vm("a").uuid, None)
        allocate(engine, "a", Change(cpu_weight=50))
    kept = world.vm("a").record
    assert kept is not None
    assert (kept.image, kept.labels, kept.protected) == ("micro", {"k": "v"}, True)
    assert (kept.allocation.vcpus, kept.allocation.cpu_weight) == (2, 50)


def test_disks_from_before_a_load_that_was_given_up_are_for_a_person(engine: Engine, site: FakeSite, vm: str) -> None:
    site.world.destroy("a")
    doctor.fix(engine, doctor.look(engine), lambda _: None)
    engine.host.storage.place_disks(vm, "load-1", [])
    assert found(engine) == [("a", Mend.NOTHING)]
    assert "load-1.old" in doctor.look(engine)[0].detail
    with vm_lock(engine.settings.locks_dir, vm, 1.0):
        engine.store.open_operation(
            vm_uuid=vm, vm_name="a", host=engine.facts.name, kind=Kind.SNAPSHOT_LOAD, request={}, before={},
            who="x", boot_id="b",
        )  # fmt: skip
        assert found(engine) == [], "one that goes on"
