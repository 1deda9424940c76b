"""Warm resets of a real guest, looked at from outside: the RAM file itself, qemu-img, /proc, libvirt, the guest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from host.copies import Copies, copies
from host.outside import Guest, patient, virsh
from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.qemu.qmp import Qmp
from hvctl.adapters.snapshots.machine import QemuMachine
from hvctl.errors import DeadlineError, GuestError, RefusedError, UnreachableError
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.tracker import Restored, TrackerKind
from hvctl.model.vm import Vm
from tests.contract.outside import made
from tests.contract.real import RealOutside, await_true, real_outside

pytestmark = pytest.mark.host

CYCLES = 5


@pytest.fixture(scope="module")
def outside(scrubbed_environment: None) -> Iterator[RealOutside]:
    with real_outside() as real:
        yield real


@pytest.fixture(scope="module")
def machine(outside: RealOutside) -> QemuMachine:
    return cast(QemuMachine, outside.host.machine)


@pytest.fixture(scope="module")
def shared(outside: RealOutside) -> Iterator[str]:
    spec = outside.spec()
    with made(outside, spec, start=True) as uuid:
        # Until its balloon has taken what it is not to have, each reset would compare.
        await_true(lambda: has_memory(outside, uuid, spec.memory), "the guest has its size")
        yield uuid


def has_memory(outside: RealOutside, uuid: str, size: int) -> bool:
    """As the guest's driver and libvirt say."""
    domains = outside.host.domains
    return domains.balloon(uuid).actual == size == domains.get(uuid).allocation.memory


def shown_memory(uuid: str) -> int:
    """Bytes, as `virsh dominfo` says."""
    told = dict(line.split(":", 1) for line in virsh("dominfo", uuid).splitlines() if ":" in line)
    return int(told["Used memory"].split()[0]) * 1024


@pytest.fixture
def vm(outside: RealOutside, machine: QemuMachine, shared: str) -> Iterator[Vm]:
    yield outside.host.domains.get(shared)
    machine.release()


@pytest.fixture
def doomed(outside: RealOutside) -> Iterator[Vm]:
    with made(outside, outside.spec(), start=True) as uuid:
        yield outside.host.domains.get(uuid)


@contextmanager
def paused(outside: RealOutside, vm: Vm) -> Iterator[None]:
    outside.host.domains.pause(vm.uuid)
    try:
        yield
    finally:
        outside.host.domains.resume(vm.uuid)


@contextmanager
def still(machine: QemuMachine, vm: Vm) -> Iterator[None]:
    """Paused by hvctl itself, which takes note of anybody else who lets the guest go on meanwhile."""
    machine.pause(vm)
    try:
        yield
    finally:
        machine.resume(vm)


@dataclass(frozen=True)
class Taken:
    """A snapshot, and what the guest was at that moment as this test keeps it."""

    snapshot: Snapshot
    kept: Copies


@contextmanager
def taken(outside: RealOutside, machine: QemuMachine, vm: Vm, name: str = "base") -> Iterator[Taken]:
    """As the engine does it: RAM while the guest runs, and under the pause what it wrote meanwhile."""
    snapshot = outside.snapshot(vm, name)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            machine.prepare(vm, snapshot)
            with still(machine, vm):
                machine.arm(vm, TrackerKind.AUTO)
            machine.copy_ram(vm, snapshot, live=True)
            with still(machine, vm):
                machine.save_state(vm, snapshot)
                assert machine.copy_ram(vm, snapshot) > 0
                kept = copies(Guest(vm.name, vm.uuid), Path(folder))
            machine.publish(snapshot)
            machine.release()
            yield Taken(snapshot, kept)
        finally:
            machine.release()
            machine.drop(outside.host.domains.get(vm.uuid), snapshot)
            machine.release()


def reset(machine: QemuMachine, vm: Vm, snapshot: Snapshot) -> Restored:
    """What the first pass over RAM did. The guest is paused before and after."""
    done = machine.restore_ram(vm, snapshot)
    assert done.pages > 0
    machine.load_state(vm, snapshot)
    machine.restore_ram(vm, snapshot, after_load=True)
    machine.release()
    return done


def ask(vm: Vm, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """A monitor command through libvirt, which is not how hvctl asks."""
    request = json.dumps({"execute": command, "arguments": arguments or {}})
    done = subprocess.run(
        ["virsh", "qemu-monitor-command", vm.uuid, request], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout).get("return")


def descriptors(vm: Vm) -> int:
    assert vm.process is not None
    return len(list(Path(f"/proc/{vm.process.pid}/fd").iterdir()))


def node_names(vm: Vm) -> set[str]:
    return {n["node-name"] for n in ask(vm, "query-named-block-nodes", {"flat": True})}


def capability_is_off(vm: Vm) -> bool:
    return {"capability": "x-ignore-shared", "state": False} in ask(vm, "query-migrate-capabilities")


def spoil(outside: RealOutside, vm: Vm) -> None:
    """Marks in RAM and on the disk, and more of both: pages and clusters that the snapshot has not."""
    outside.spoil(vm.uuid)
    script = "for f in /run/junk /data/junk; do head -c 4m /dev/urandom > $f; done; sync"
    command = {"path": "/bin/sh", "arg": ["-c", script]}
    patient(lambda: outside.host.domains.agent(vm.uuid, "guest-exec", command, 5.0))


def await_content(outside: RealOutside, vm: Vm, wanted: Mapping[str, str]) -> None:
    """libvirt drops the agent's connection once more a moment after a reset, in the middle of whatever is asked."""

    def same() -> bool:
        try:
            return outside.content(vm.uuid) == wanted
        except (UnreachableError, DeadlineError, GuestError):
            return False

    await_true(same, "the guest is as in the snapshot")


def test_resets_in_a_row(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """Same process, all RAM and the disk equal while still paused, agent answering, nothing leaked."""
    outside.spoil(vm.uuid)
    before = outside.content(vm.uuid)
    with taken(outside, machine, vm) as at:
        folder = sorted(p.name for p in Path(at.snapshot.folder).iterdir())
        counts = []
        for _ in range(CYCLES):
            spoil(outside, vm)
            assert outside.content(vm.uuid) != before
            with paused(outside, vm):
                assert len(at.kept.unequal()) == 2
                assert reset(machine, vm, at.snapshot).found_by is TrackerKind.UFFD
                assert at.kept.unequal() == {}
                assert machine.audit(vm, at.snapshot) == 0
                machine.release()
                assert capability_is_off(vm)
            await_content(outside, vm, before)
            counts.append((descriptors(vm), len(node_names(vm)), ask(vm, "query-jobs")))
        assert counts == [counts[0]] * CYCLES
        assert outside.host.domains.get(vm.uuid).process == vm.process
        assert (
            sorted(p.name for p in Path(at.snapshot.folder).iterdir())
            == folder
            == ["index", "manifest.json", "ram", "vmstate.qcow2"]
        )


def test_the_files_of_a_snapshot_are_closed_to_others(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as at:
        folder = Path(at.snapshot.folder)
        modes = {p.name: (p.stat().st_mode & 0o7777, p.stat().st_uid) for p in folder.iterdir()}
        qemu = outside.host.domains.facts().qemu_uid
        ours = dict.fromkeys(("manifest.json", "ram", "index"), (0o600, 0))
        assert modes == {**ours, "vmstate.qcow2": (0o600, qemu)}
        beside = {p.name: p.stat().st_mode & 0o7777 for p in folder.parent.iterdir() if p.is_file()}
        assert beside == {"tracking.json": 0o600}
        for place in (folder, *list(folder.parents)[:2]):
            assert (place.stat().st_mode & 0o7777, place.stat().st_uid) == (0o711, 0)


def test_no_device_has_a_load_wait_for_a_vcpu(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """QEMU's device for the task priority of 32-bit Windows does, and every emulated vCPU then drops its code first."""
    with taken(outside, machine, vm) as base:
        state = (Path(base.snapshot.folder) / "vmstate.qcow2").read_bytes()
        assert b"apic" in state
        assert b"kvm-tpr-opt" not in state


def test_two_snapshots_in_any_order(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm, "one") as one:
        outside.spoil(vm.uuid)
        content = outside.content(vm.uuid)
        with taken(outside, machine, vm, "two") as two:
            for at in (one, two, one, two):
                outside.spoil(vm.uuid)
                with paused(outside, vm):
                    reset(machine, vm, at.snapshot)
                    assert at.kept.unequal() == {}
                outside.await_guest(vm.uuid)
            await_content(outside, vm, content)


def test_dropping_leaves_the_process_as_it_was(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    before = descriptors(vm), node_names(vm)
    for _ in range(3):
        with taken(outside, machine, vm):
            assert node_names(vm) != before[1]
        assert (descriptors(vm), node_names(vm)) == before
    assert all(not n["image"].get("snapshots") for n in ask(vm, "query-named-block-nodes", {"flat": True}))


def test_a_failed_load_is_an_error_and_the_guest_stays_paused(
    outside: RealOutside, machine: QemuMachine, doomed: Vm
) -> None:
    """RAM is left as the guest has it: its virtio rings do not fit the devices of the snapshot.

    The machine is dead then: a second load into it ended, once in three times, with an assertion in QEMU.
    """
    before = node_names(doomed)
    with taken(outside, machine, doomed) as at:
        spoil(outside, doomed)
        outside.host.domains.pause(doomed.uuid)
        with pytest.raises(GuestError, match="snapshot-load failed"):
            machine.load_state(doomed, at.snapshot)
        machine.release()
        assert not ask(doomed, "query-status")["running"]
        assert capability_is_off(doomed)
    # Half-loaded as it is, the snapshot could be dropped.
    assert node_names(doomed) == before
    assert not Path(at.snapshot.folder).exists()


# --- what makes a snapshot not fit


def binding(machine: QemuMachine, vm: Vm) -> Binding:
    """As it is now: an operation asks only once."""
    machine.release()
    return machine.binding(vm)


def refused(outside: RealOutside, machine: QemuMachine, vm: Vm, snapshot: Snapshot, reason: str) -> None:
    with paused(outside, vm):
        (ram,) = (Path(r.path) for r in vm.ram)
        before = ram.stat().st_mtime_ns
        for touch in (machine.restore_ram, machine.load_state):
            with pytest.raises(RefusedError, match=reason):
                touch(vm, snapshot)
        assert ram.stat().st_mtime_ns == before
        machine.release()


def test_a_plugged_device_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as at:
        ask(vm, "object-add", {"qom-type": "memory-backend-ram", "id": "plugged", "size": 1 << 20})
        refused(outside, machine, vm, at.snapshot, "'memory plugged 1048576' is new")
        ask(vm, "object-del", {"id": "plugged"})
        assert binding(machine, vm) == at.snapshot.binding


def test_a_dirty_bitmap_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as at:
        bitmap = {"node": at.snapshot.nodes[0], "name": "backup"}
        ask(vm, "block-dirty-bitmap-add", bitmap)
        refused(outside, machine, vm, at.snapshot, r"bitmap backup on .* is new")
        with pytest.raises(RefusedError, match="dirty bitmap 'backup'"):
            machine.nodes(vm)
        ask(vm, "block-dirty-bitmap-remove", bitmap)
        assert binding(machine, vm) == at.snapshot.binding


def test_a_block_job_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as at:
        ask(vm, "blockdev-add", {"driver": "null-co", "node-name": "sink", "size": 64 << 20})
        job = {"job-id": "copy", "device": at.snapshot.nodes[0], "target": "sink", "sync": "full", "speed": 1}
        ask(vm, "blockdev-backup", job)
        try:
            refused(outside, machine, vm, at.snapshot, "'job copy backup' is new")
            with pytest.raises(RefusedError, match="block job is running: copy"):
                machine.nodes(vm)
        finally:
            ask(vm, "block-job-cancel", {"device": "copy", "force": True})
            while ask(vm, "query-jobs"):
                pass
            ask(vm, "blockdev-del", {"node-name": "sink"})
        assert binding(machine, vm) == at.snapshot.binding


def test_a_raw_disk_is_refused(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    image = Path(str(vm.disks[0].path)).parent / "raw.img"
    image.touch()
    os.truncate(image, 1 << 20)
    os.chown(image, outside.host.domains.facts().qemu_uid, -1)
    subprocess.run(["virsh", "attach-disk", vm.uuid, image, "vdz", "--live", "--subdriver", "raw"], check=True)
    try:
        with pytest.raises(RefusedError, match=r"is raw .*: it cannot hold a snapshot"):
            machine.nodes(vm)
    finally:
        subprocess.run(["virsh", "detach-disk", vm.uuid, "vdz", "--live"], check=True)
        while any("raw.img" in n["file"] for n in ask(vm, "query-named-block-nodes", {"flat": True})):
            pass
        image.unlink()


def test_another_life_of_the_vm_is_told_apart(outside: RealOutside, machine: QemuMachine, doomed: Vm) -> None:
    with taken(outside, machine, doomed) as at:
        outside.kill(doomed)
        outside.host.domains.start(doomed.uuid)
        reborn = outside.host.domains.get(doomed.uuid)
        refused(outside, machine, reborn, at.snapshot, "its QEMU process is another one")
        # The tag that the dead process left in the overlay goes through the new one.
        assert at.snapshot.tag in qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path)))
        machine.drop(reborn, at.snapshot)
        assert qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path))) == ()


def test_the_tag_goes_from_the_overlay_when_qemu_is_gone(
    outside: RealOutside, machine: QemuMachine, doomed: Vm
) -> None:
    with taken(outside, machine, doomed) as at:
        outside.kill(doomed)
        machine.release()
        machine.drop(None, at.snapshot)
        assert qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path))) == ()
        assert not Path(at.snapshot.folder).exists()


def test_what_a_killed_hvctl_left_is_cleared(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """The switch that leaves RAM out still on, and a finished job not dismissed: whoever is inside next clears both."""
    snapshot = outside.snapshot(vm, "torn")
    machine.prepare(vm, snapshot)
    machine.release()
    ask(vm, "migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})
    ask(vm, "snapshot-delete", {"job-id": "hvctl-job", "tag": "none", "devices": [snapshot.vmstate_node]})
    assert not capability_is_off(vm)
    assert machine.binding(vm).process == vm.process
    machine.release()
    assert capability_is_off(vm)
    assert ask(vm, "query-jobs") == []
    machine.drop(vm, snapshot)
    assert not Path(snapshot.folder).exists()


def test_a_stopped_qemu_is_a_deadline_not_a_hang(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    assert vm.process is not None
    os.kill(vm.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError), Qmp(str(vm.monitor), 0.5, vm.process.pid):
            pass
    finally:
        os.kill(vm.process.pid, signal.SIGCONT)
    assert machine.binding(vm).process == vm.process


def test_the_balloon_of_the_snapshot_comes_back(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """The state load does it, and a guest that moved on meanwhile is asked."""
    outside.await_guest(vm.uuid)
    domains = outside.host.domains
    domains.set_balloon(vm.uuid, vm.max_memory)
    await_true(lambda: has_memory(outside, vm.uuid, vm.max_memory), "the balloon is empty")
    with taken(outside, machine, domains.get(vm.uuid)) as at:
        less = domains.set_balloon(vm.uuid, at.snapshot.balloon - (32 << 20))
        await_true(lambda: has_memory(outside, vm.uuid, less), "the balloon is in use")
        with paused(outside, vm):
            # What the guest gave away looks clean to the tracker.
            assert reset(machine, vm, at.snapshot).found_by is TrackerKind.COMPARE
            assert at.kept.unequal() == {}
        machine.restore_balloon(domains.get(vm.uuid), at.snapshot)
        assert has_memory(outside, vm.uuid, at.snapshot.balloon)
        # QEMU says nothing of what a load does, and libvirt shows what it was told.
        await_true(lambda: shown_memory(vm.uuid) == at.snapshot.balloon, "libvirt shows what there is")
        domains.set_balloon(vm.uuid, less)
        machine.restore_balloon(domains.get(vm.uuid), at.snapshot)
        machine.release()
        assert ask(vm, "query-balloon")["actual"] == at.snapshot.balloon
    outside.await_guest(vm.uuid)
    domains.set_balloon(vm.uuid, outside.spec().memory)
