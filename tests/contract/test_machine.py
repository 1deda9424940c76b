"""ports.Machine: the inside of a QEMU process, in the order warm resets use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hvctl.errors import GuestError, RefusedError, UnreachableError
from hvctl.model.snapshot import Snapshot
from hvctl.model.tracker import Restored, TrackerKind
from hvctl.model.vm import State, VmSpec
from hvctl.ports import Host
from tests.contract.outside import Outside, made


def take(outside: Outside, vm: str, name: str, parent: Snapshot | None = None) -> Snapshot:
    """As the engine does it: RAM while the guest runs, and under the pause what it wrote meanwhile."""
    machine, seen = outside.host.machine, outside.host.domains.get(vm)
    snapshot = replace(outside.snapshot(seen, name), parent=parent.id if parent else None)
    machine.prepare(seen, snapshot)
    if machine.tracking(seen) is None:
        machine.pause(seen)
        machine.arm(seen, TrackerKind.AUTO)
        machine.resume(seen)
    machine.copy_ram(seen, snapshot, live=True)
    machine.pause(seen)
    machine.save_state(seen, snapshot)
    assert machine.copy_ram(seen, snapshot) > 0
    machine.publish(snapshot)
    machine.resume(seen)
    machine.release()
    return snapshot


def reset(outside: Outside, vm: str, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO) -> Restored:
    """What the first pass over RAM wrote, and how it found that."""
    machine, seen = outside.host.machine, outside.host.domains.get(vm)
    machine.ready(seen, snapshot)
    machine.pause(seen)
    written = machine.restore_ram(seen, snapshot, tracker)
    assert written.pages > 0
    machine.load_state(seen, snapshot)
    machine.restore_ram(seen, snapshot, tracker, after_load=True)
    assert machine.restore_ram(seen, snapshot, tracker).pages == 0
    assert machine.audit(seen, snapshot) == 0
    machine.resume(seen)
    machine.restore_balloon(seen, snapshot)
    machine.release()
    outside.await_guest(vm)
    return written


@pytest.fixture
def snapshot(outside: Outside, running: str) -> Iterator[Snapshot]:
    taken = take(outside, running, "base")
    yield taken
    outside.host.machine.drop(outside.host.domains.get(running), taken)


def test_a_binding_names_process_devices_and_disks(host: Host, running: str) -> None:
    vm = host.domains.get(running)
    binding = host.machine.binding(vm)
    assert binding == host.machine.binding(vm)
    assert binding.process == vm.process
    assert binding.devices == tuple(sorted(binding.devices))
    assert binding.blocks == tuple(sorted(binding.blocks))
    assert binding.devices
    assert binding.blocks


def test_one_node_for_each_writable_disk(host: Host, running: str) -> None:
    vm = host.domains.get(running)
    assert len(host.machine.nodes(vm)) == len([d for d in vm.disks if d.writable]) > 0


def test_the_room_a_snapshot_needs_and_has(host: Host, running: str) -> None:
    need, free = host.machine.room(host.domains.get(running))
    assert 0 < need < free


def test_a_reset_brings_everything_back(host: Host, outside: Outside, running: str) -> None:
    outside.spoil(running)
    before, process = outside.content(running), host.domains.get(running).process
    snapshot = take(outside, running, "full")
    assert outside.content(running) == before
    for _ in range(2):
        outside.spoil(running)
        assert all(outside.content(running)[part] != before[part] for part in before)
        reset(outside, running, snapshot)
        assert outside.content(running) == before
        assert host.domains.get(running).process == process
    assert host.machine.binding(host.domains.get(running)) == snapshot.binding
    host.machine.drop(host.domains.get(running), snapshot)


def test_a_dropped_snapshot_leaves_nothing(host: Host, outside: Outside, running: str) -> None:
    before = host.machine.binding(host.domains.get(running))
    snapshot = take(outside, running, "gone")
    assert outside.exists(f"{snapshot.folder}/ram")
    vm = host.domains.get(running)
    host.machine.drop(vm, snapshot)
    host.machine.drop(vm, snapshot)
    assert snapshot not in host.machine.snapshots()
    assert not outside.exists(snapshot.folder)
    assert host.machine.binding(vm) == before
    # A snapshot of the same tag and node can be taken again: neither is left inside the process or the overlays.
    host.machine.prepare(vm, snapshot)
    host.domains.pause(running)
    host.machine.save_state(vm, snapshot)
    host.domains.resume(running)
    host.machine.drop(vm, snapshot)
    assert not outside.exists(snapshot.folder)


def test_a_snapshot_exists_when_it_is_published(host: Host, outside: Outside, running: str) -> None:
    vm = host.domains.get(running)
    snapshot = outside.snapshot(vm, "half")
    host.machine.prepare(vm, snapshot)
    host.machine.prepare(vm, snapshot)
    host.domains.pause(running)
    host.machine.save_state(vm, snapshot)
    host.machine.save_state(vm, snapshot)
    host.machine.copy_ram(vm, snapshot)
    host.machine.copy_ram(vm, snapshot)
    host.domains.resume(running)
    assert list(host.machine.snapshots(running)) == []
    host.machine.publish(snapshot)
    host.machine.publish(snapshot)
    assert [s.id for s in host.machine.snapshots(running)] == [snapshot.id]
    host.machine.drop(vm, snapshot)
    assert list(host.machine.snapshots(running)) == []


def test_snapshots_are_told_oldest_first_and_by_vm(host: Host, outside: Outside, running: str) -> None:
    taken = [take(outside, running, name) for name in ("zulu", "alpha")]
    assert [s.name for s in host.machine.snapshots(running)] == ["zulu", "alpha"]
    assert [s.binding for s in host.machine.snapshots(running)] == [s.binding for s in taken]
    assert {s.id for s in taken} <= {s.id for s in host.machine.snapshots()}
    assert list(host.machine.snapshots("00000000-0000-4000-8000-000000000000")) == []
    for snapshot in taken:
        host.machine.drop(host.domains.get(running), snapshot)


def test_a_corrupt_manifest_is_no_snapshot(host: Host, outside: Outside, running: str, snapshot: Snapshot) -> None:
    outside.corrupt(f"{snapshot.folder}/manifest.json")
    assert list(host.machine.snapshots(running)) == []


def test_what_is_not_snapshot_cannot_be_dropped_away(host: Host, outside: Outside, running: str) -> None:
    vm = host.domains.get(running)
    host.machine.drop(vm, outside.snapshot(vm, "never"))
    assert host.domains.get(running).state is State.RUNNING


@pytest.fixture
def doomed(outside: Outside) -> Iterator[VmSpec]:
    """A VM whose process a test may ruin."""
    spec = outside.spec()
    with made(outside, spec, start=True):
        yield spec


def test_what_a_snapshot_does_not_hold_cannot_be_loaded(host: Host, outside: Outside, doomed: VmSpec) -> None:
    vm = host.domains.get(doomed.uuid)
    snapshot = outside.snapshot(vm, "empty")
    host.machine.prepare(vm, snapshot)
    host.domains.pause(vm.uuid)
    host.machine.copy_ram(vm, snapshot)
    with pytest.raises((GuestError, RefusedError)):
        host.machine.load_state(vm, snapshot)
    assert host.domains.get(vm.uuid).state is not State.RUNNING
    host.machine.drop(vm, snapshot)


def test_the_inside_is_touched_only_while_paused(host: Host, outside: Outside, running: str) -> None:
    snapshot = take(outside, running, "still")
    vm = host.domains.get(running)
    for touch in (host.machine.save_state, host.machine.copy_ram, host.machine.restore_ram, host.machine.load_state):
        with pytest.raises(RefusedError):
            touch(vm, snapshot)
    assert host.domains.get(running).state is State.RUNNING
    host.machine.drop(vm, snapshot)


def test_a_snapshot_of_other_devices_is_refused(host: Host, outside: Outside, doomed: VmSpec) -> None:
    snapshot = take(outside, doomed.uuid, "before")
    host.domains.set_vcpus(doomed.uuid, 2)
    host.domains.pause(doomed.uuid)
    vm = host.domains.get(doomed.uuid)
    assert host.machine.binding(vm) != snapshot.binding
    for touch in (host.machine.restore_ram, host.machine.load_state):
        with pytest.raises(RefusedError):
            touch(vm, snapshot)


def test_a_snapshot_of_a_process_that_died(host: Host, outside: Outside, doomed: VmSpec) -> None:
    vm = host.domains.get(doomed.uuid)
    snapshot = take(outside, doomed.uuid, "orphan")
    outside.kill(vm)
    for act in (host.machine.prepare, host.machine.restore_ram, host.machine.load_state):
        with pytest.raises(UnreachableError):
            act(vm, snapshot)
    with pytest.raises(UnreachableError):
        host.machine.binding(vm)
    assert [s.id for s in host.machine.snapshots(doomed.uuid)] == [snapshot.id]
    host.machine.drop(None, snapshot)
    host.machine.drop(None, snapshot)
    assert list(host.machine.snapshots(doomed.uuid)) == []
    assert not outside.exists(snapshot.folder)
    host.domains.start(doomed.uuid)
    assert host.machine.binding(host.domains.get(doomed.uuid)).process != snapshot.binding.process
