"""ports.Machine: the inside of a QEMU process, in the order warm resets use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hvctl.errors import GuestError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.tracker import Life, Restored, TrackerKind
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


@pytest.fixture(autouse=True)
def released(outside: Outside) -> Iterator[None]:
    """Each test is an operation of its own, or several."""
    yield
    outside.host.machine.release()


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


# --- a tree


def test_a_tree_of_snapshots_goes_from_any_to_any(host: Host, outside: Outside, running: str) -> None:
    """Each is kept as a difference to its parent, and holds all of itself all the same."""
    outside.spoil(running)
    first = take(outside, running, "first")
    contents = {first.id: outside.content(running)}
    chain = [first]
    for name in ("second", "third"):
        outside.spoil(running)
        chain.append(take(outside, running, name, parent=chain[-1]))
        contents[chain[-1].id] = outside.content(running)
    for snapshot in (chain[0], chain[2], chain[1], chain[2], chain[0]):
        outside.spoil(running)
        reset(outside, running, snapshot)
        assert outside.content(running) == contents[snapshot.id]
    vm = host.domains.get(running)
    for snapshot in chain:
        host.machine.drop(vm, snapshot)
    assert list(host.machine.snapshots(running, hidden=True)) == []


@pytest.mark.parametrize("back", ["to the child", "to the child of the child"])
def test_what_others_build_on_goes_when_they_do(host: Host, outside: Outside, running: str, back: str) -> None:
    vm = host.domains.get(running)
    binding = host.machine.binding(vm)
    outside.spoil(running)
    one = take(outside, running, "one")
    outside.spoil(running)
    two = take(outside, running, "two", parent=one)
    before = outside.content(running)
    outside.spoil(running)
    three = take(outside, running, "three", parent=two)
    after = outside.content(running)
    host.machine.drop(vm, one)
    host.machine.drop(vm, one)
    assert [s.name for s in host.machine.snapshots(running)] == ["two", "three"]
    assert [s.name for s in host.machine.snapshots(running, hidden=True)] == ["one", "two", "three"]
    assert outside.exists(one.folder)
    outside.spoil(running)
    reset(outside, running, two if back == "to the child" else three)
    assert outside.content(running) == (before if back == "to the child" else after)
    host.machine.drop(vm, two)
    outside.spoil(running)
    reset(outside, running, three)
    assert outside.content(running) == after, "by pages of two that are not there for themselves any more"
    host.machine.drop(vm, three)
    assert list(host.machine.snapshots(running, hidden=True)) == []
    assert not any(outside.exists(s.folder) for s in (one, two, three))
    assert host.machine.binding(vm) == binding


def test_a_snapshot_of_what_it_was_reset_to_takes_little(host: Host, outside: Outside, running: str) -> None:
    base = take(outside, running, "base")
    vm = host.domains.get(running)
    outside.spoil(running)
    child = take(outside, running, "child", parent=base)
    stored = {s.name: s.stored for s in host.machine.snapshots(running)}
    assert stored["base"] > 0
    assert 0 < stored["child"] <= stored["base"]
    for snapshot in (child, base):
        host.machine.drop(vm, snapshot)


# --- who tells what was written


def test_a_tracker_saves_the_comparing(host: Host, outside: Outside, running: str) -> None:
    snapshot = take(outside, running, "tracked")
    vm = host.domains.get(running)
    state = host.machine.tracking(vm)
    assert state is not None
    assert state.process == vm.process
    outside.spoil(running)
    if state.kind is TrackerKind.COMPARE:
        assert state.reason, "why none of the fast ones is used"
        assert reset(outside, running, snapshot).found_by is TrackerKind.COMPARE
    else:
        assert state.base == snapshot.id
        assert reset(outside, running, snapshot).found_by is state.kind
        outside.spoil(running)
        compared = reset(outside, running, snapshot, TrackerKind.COMPARE)
        assert compared.found_by is TrackerKind.COMPARE
        outside.spoil(running)
        # Comparing does without a tracker, and the next one that asks for the best arms it again.
        assert reset(outside, running, snapshot).found_by is TrackerKind.COMPARE
        outside.spoil(running)
        assert reset(outside, running, snapshot).found_by is state.kind
    resets = host.machine.tracking(vm)
    assert resets is not None
    assert resets.resets >= 1
    host.machine.drop(vm, snapshot)
    assert host.machine.tracking(vm) is None, "nothing of it is left with the last snapshot"


def test_a_tracker_is_armed_only_while_paused(host: Host, outside: Outside, running: str, snapshot: Snapshot) -> None:
    vm = host.domains.get(running)
    with pytest.raises(RefusedError):
        host.machine.arm(vm, TrackerKind.AUTO)
    host.machine.pause(vm)
    assert host.machine.arm(vm, TrackerKind.AUTO).base is None, "what was written before is not known"
    assert host.machine.arm(vm, TrackerKind.COMPARE).kind is TrackerKind.COMPARE
    host.machine.resume(vm)
    host.machine.release()


# --- pausing and going on


def test_pausing_and_going_on_may_be_repeated(host: Host, outside: Outside, running: str) -> None:
    machine, vm = host.machine, host.domains.get(running)
    for _ in range(2):
        machine.pause(vm)
        assert host.domains.get(running).state is State.PAUSED
    for _ in range(2):
        machine.resume(vm)
        assert host.domains.get(running).state is State.RUNNING
    machine.release()
    assert machine.await_life(vm, 1.0) == Life(), "nobody greeted it"
    outside.await_guest(running)


def test_a_guest_that_is_greeted_answers_reseeded_and_with_the_time(host: Host, running: str) -> None:
    machine, vm = host.machine, host.domains.get(running)
    for clock in (True, False):
        machine.pause(vm)
        machine.resume(vm, greet=True, clock=clock)
        life = machine.await_life(vm, 30.0)
        assert life.seconds is not None
        assert life.seconds >= 0
        assert (life.reseeded, life.clock_set) == (True, clock)
        machine.release()
    # One that runs is not greeted: it may be in the middle of anything.
    machine.resume(vm, greet=True, clock=True)
    assert machine.await_life(vm, 1.0) == Life()
    machine.release()


def test_a_line_is_for_a_guest_that_runs_and_costs_no_greeting(host: Host, running: str) -> None:
    machine, vm = host.machine, host.domains.get(running)
    assert machine.tell(vm, "notice withdrawn save 2026-01-01T00:00:00Z 2026-01-01T01:00:00Z a test")
    assert not machine.tell(replace(vm, pulse=None), "notice")
    machine.pause(vm)
    machine.resume(vm, greet=True)
    assert machine.await_life(vm, 30.0).reseeded


def test_a_guest_is_heard_and_only_with_the_line_that_is_awaited(host: Host, outside: Outside, running: str) -> None:
    machine, vm = host.machine, host.domains.get(running)
    one, other = (digit * 32 for digit in "12")
    for notice in (other, one):
        outside.acknowledge(running, notice)
    assert not machine.hear(replace(vm, pulse=None), f"ready {one}", 0.0)
    assert machine.hear(vm, f"ready {one}", 30.0)
    assert not machine.hear(vm, f"ready {other}", 0.0), "what was before it is gone"
    # It is no sign of life, and costs none.
    outside.acknowledge(running, one)
    machine.pause(vm)
    machine.resume(vm, greet=True)
    assert machine.await_life(vm, 30.0).reseeded
    machine.release()
    outside.acknowledge(running, one)
    assert machine.hear(vm, f"ready {one}", 30.0)


def test_getting_ready_changes_nothing_and_refuses_what_does_not_fit(
    host: Host, outside: Outside, running: str, snapshot: Snapshot
) -> None:
    vm = host.domains.get(running)
    outside.spoil(running)
    content = outside.content(running)
    for _ in range(2):
        host.machine.ready(vm, snapshot)
        host.machine.ready(vm)
    host.machine.release()
    assert outside.content(running) == content
    assert host.domains.get(running).state is State.RUNNING
    reset(outside, running, snapshot)


# --- parts


def test_a_part_of_ram_goes_back_by_a_copy_of_what_is(host: Host, outside: Outside, running: str) -> None:
    """The first page is the firmware's: it does not change, and so nothing does."""
    outside.spoil(running)
    source = take(outside, running, "source")
    outside.spoil(running)
    content, process = outside.content(running), host.domains.get(running).process
    machine, vm = host.machine, host.domains.get(running)
    scratch = replace(outside.snapshot(vm, "scratch"), targets={}, hidden=True, parent=source.id)
    machine.prepare(vm, scratch)
    machine.pause(vm)
    machine.save_state(vm, scratch)
    machine.copy_ram(vm, scratch)
    assert machine.patch_ram(vm, scratch, source, [Range(0, 0x1000)]) == 0x1000
    with pytest.raises(RefusedError):
        machine.patch_ram(vm, scratch, source, [Range(1 << 44, (1 << 44) + 0x1000)])
    machine.publish(scratch)
    machine.restore_ram(vm, scratch)
    machine.load_state(vm, scratch, ())
    machine.restore_ram(vm, scratch, after_load=True)
    assert machine.audit(vm, scratch) == 0
    machine.resume(vm)
    machine.drop(vm, scratch)
    machine.release()
    outside.await_guest(running)
    assert outside.content(running) == content
    assert host.domains.get(running).process == process
    assert [s.name for s in host.machine.snapshots(running, hidden=True)] == ["source"]
    reset(outside, running, source)
    host.machine.drop(vm, source)


def test_a_disk_is_put_back_only_when_that_was_prepared(
    host: Host, outside: Outside, running: str, snapshot: Snapshot
) -> None:
    vm = host.domains.get(running)
    (target,) = snapshot.targets
    content = outside.content(running)
    with pytest.raises(RefusedError):
        host.machine.restore_disk(vm, snapshot, target)
    host.machine.prepare_disk(vm, snapshot, target)
    host.machine.prepare_disk(vm, snapshot, target)
    host.machine.release()
    assert outside.content(running) == content, "to prepare it touches nothing"
    host.machine.finish_disk(vm, target)
    assert outside.content(running) == content, "nothing was begun that could be ended"
    host.machine.release()


def test_a_disk_that_is_unplugged_goes_back_and_snapshots_fit_it_again(
    host: Host, outside: Outside, running: str
) -> None:
    outside.spoil(running)
    snapshot = take(outside, running, "plugged")
    domains, machine, vm = host.domains, host.machine, host.domains.get(running)
    (target,) = snapshot.targets
    content, limits = outside.content(running), vm.allocation.disks
    outside.spoil(running)
    assert not machine.disk_is_reverted(vm, snapshot, target)
    machine.prepare_disk(vm, snapshot, target)
    with pytest.raises(RefusedError):
        machine.revert_disk(vm, snapshot, target)
    xml = domains.disk_xml(running, target)
    for _ in range(2):
        domains.unplug_disk(running, target)
        assert domains.get(running).disks == ()
    with pytest.raises(NotFoundError):
        domains.disk_xml(running, target)
    assert target in domains.xml(running), "the definition keeps it"
    for _ in range(2):
        machine.revert_disk(vm, snapshot, target)
        assert machine.disk_is_reverted(vm, snapshot, target)
    for _ in range(2):
        domains.plug_disk(running, target, xml)
    assert (domains.get(running).disks[0].target, domains.get(running).allocation.disks) == (target, limits)
    assert (machine.rebind(vm, snapshot.binding), machine.rebind(vm, snapshot.binding)) == (1, 0)
    (found,) = (s for s in machine.snapshots(running) if s.id == snapshot.id)
    assert found.binding == machine.binding(vm) != snapshot.binding
    assert found.targets == machine.nodes(vm)
    machine.release()
    reset(outside, running, found)
    assert outside.content(running) == content
    machine.drop(host.domains.get(running), found)
