"""Warm resets of a real guest, looked at from outside: the RAM file itself, qemu-img, /proc, libvirt, the guest."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters import qemuimg
from hvctl.adapters.machine import QemuMachine
from hvctl.adapters.qmp import Qmp
from hvctl.errors import DeadlineError, GuestError, RefusedError, UnreachableError
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm
from tests.contract.outside import made
from tests.contract.real import RealOutside, await_true, real_outside

pytestmark = pytest.mark.host

CYCLES = 20
BLOCK = 1 << 20


@pytest.fixture(scope="module")
def outside(scrubbed_environment: None) -> Iterator[RealOutside]:
    with real_outside() as real:
        yield real


@pytest.fixture(scope="module")
def machine(outside: RealOutside) -> QemuMachine:
    assert isinstance(outside.host.machine, QemuMachine)
    return outside.host.machine


@pytest.fixture(scope="module")
def shared(outside: RealOutside) -> Iterator[str]:
    with made(outside, outside.spec(), start=True) as uuid:
        yield uuid


@pytest.fixture
def vm(outside: RealOutside, shared: str) -> Vm:
    return outside.host.domains.get(shared)


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
def taken(outside: RealOutside, machine: QemuMachine, vm: Vm, name: str = "base") -> Iterator[Snapshot]:
    snapshot = outside.snapshot(vm, name)
    try:
        machine.prepare(vm, snapshot)
        with paused(outside, vm):
            machine.save_state(vm, snapshot)
            snapshot = replace(snapshot, stored=machine.copy_ram(vm, snapshot))
        machine.publish(snapshot)
        yield snapshot
    finally:
        machine.drop(outside.host.domains.get(vm.uuid), snapshot)


def reset(machine: QemuMachine, vm: Vm, snapshot: Snapshot) -> None:
    """The guest is paused before and after."""
    assert machine.restore_ram(vm, snapshot) > 0
    machine.load_state(vm, snapshot)
    machine.restore_ram(vm, snapshot)


def unequal_bytes(vm: Vm, snapshot: Snapshot) -> int:
    """Blocks of guest RAM that are not the snapshot's, by plain reads of both files."""
    assert vm.ram_path is not None
    with Path(vm.ram_path).open("rb") as now, Path(snapshot.folder, "ram").open("rb") as then:
        pairs = itertools.takewhile(any, ((now.read(BLOCK), then.read(BLOCK)) for _ in itertools.count()))
        return sum(a != b for a, b in pairs)


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
    outside.host.domains.agent(
        vm.uuid,
        "guest-exec",
        {
            "path": "/bin/sh",
            "arg": ["-c", "for f in /run/junk /data/junk; do head -c 4m /dev/urandom > $f; done; sync"],
        },
        5.0,
    )


def await_content(outside: RealOutside, vm: Vm, wanted: Mapping[str, str]) -> None:
    """libvirt drops the agent's connection once more a moment after a reset, in the middle of whatever is asked."""

    def same() -> bool:
        try:
            return outside.content(vm.uuid) == wanted
        except (UnreachableError, DeadlineError, GuestError):
            return False

    await_true(same, "the guest is as in the snapshot")


def test_twenty_resets_in_a_row(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """Same process, all RAM equal while still paused, disk back, agent answering, nothing leaked."""
    outside.spoil(vm.uuid)
    before = outside.content(vm.uuid)
    with taken(outside, machine, vm) as snapshot:
        folder = sorted(p.name for p in Path(snapshot.folder).iterdir())
        counts = []
        for _ in range(CYCLES):
            spoil(outside, vm)
            assert outside.content(vm.uuid) != before
            with paused(outside, vm):
                assert unequal_bytes(vm, snapshot) > 0
                reset(machine, vm, snapshot)
                assert unequal_bytes(vm, snapshot) == 0
                assert machine.difference(vm, snapshot) == 0
                assert capability_is_off(vm)
            await_content(outside, vm, before)
            counts.append((descriptors(vm), len(node_names(vm)), ask(vm, "query-jobs")))
        assert counts == [counts[0]] * CYCLES
        assert outside.host.domains.get(vm.uuid).process == vm.process
        assert (
            sorted(p.name for p in Path(snapshot.folder).iterdir())
            == folder
            == ["manifest.json", "ram", "vmstate.qcow2"]
        )


def test_the_files_of_a_snapshot_are_closed_to_others(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as snapshot:
        folder = Path(snapshot.folder)
        modes = {p.name: (p.stat().st_mode & 0o7777, p.stat().st_uid) for p in folder.iterdir()}
        qemu = outside.host.domains.facts().qemu_uid
        assert modes == {"manifest.json": (0o600, 0), "ram": (0o600, 0), "vmstate.qcow2": (0o600, qemu)}
        for place in (folder, *list(folder.parents)[:2]):
            assert (place.stat().st_mode & 0o7777, place.stat().st_uid) == (0o711, 0)


def test_two_snapshots_in_any_order(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm, "one") as one:
        outside.spoil(vm.uuid)
        content = outside.content(vm.uuid)
        with taken(outside, machine, vm, "two") as two:
            for snapshot in (one, two, one, two):
                outside.spoil(vm.uuid)
                with paused(outside, vm):
                    reset(machine, vm, snapshot)
                    assert unequal_bytes(vm, snapshot) == 0
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
    with taken(outside, machine, doomed) as snapshot:
        spoil(outside, doomed)
        outside.host.domains.pause(doomed.uuid)
        with pytest.raises(GuestError, match="snapshot-load failed"):
            machine.load_state(doomed, snapshot)
        assert not ask(doomed, "query-status")["running"]
        assert capability_is_off(doomed)
    # Half-loaded as it is, the snapshot could be dropped.
    assert node_names(doomed) == before
    assert not Path(snapshot.folder).exists()


# --- what makes a snapshot not fit


def refused(outside: RealOutside, machine: QemuMachine, vm: Vm, snapshot: Snapshot, reason: str) -> None:
    with paused(outside, vm):
        before = Path(str(vm.ram_path)).stat().st_mtime_ns
        for touch in (machine.restore_ram, machine.load_state):
            with pytest.raises(RefusedError, match=reason):
                touch(vm, snapshot)
        assert Path(str(vm.ram_path)).stat().st_mtime_ns == before


def test_a_plugged_device_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as snapshot:
        ask(vm, "object-add", {"qom-type": "memory-backend-ram", "id": "plugged", "size": 1 << 20})
        refused(outside, machine, vm, snapshot, "memory plugged 1048576 is new")
        ask(vm, "object-del", {"id": "plugged"})
        assert machine.binding(vm) == snapshot.binding


def test_a_dirty_bitmap_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as snapshot:
        bitmap = {"node": snapshot.nodes[0], "name": "backup"}
        ask(vm, "block-dirty-bitmap-add", bitmap)
        refused(outside, machine, vm, snapshot, r"bitmap backup on .* is new")
        with pytest.raises(RefusedError, match="dirty bitmap 'backup'"):
            machine.nodes(vm)
        ask(vm, "block-dirty-bitmap-remove", bitmap)
        assert machine.binding(vm) == snapshot.binding


def test_a_block_job_is_named(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    with taken(outside, machine, vm) as snapshot:
        ask(vm, "blockdev-add", {"driver": "null-co", "node-name": "sink", "size": 64 << 20})
        job = {"job-id": "copy", "device": snapshot.nodes[0], "target": "sink", "sync": "full", "speed": 1}
        ask(vm, "blockdev-backup", job)
        try:
            refused(outside, machine, vm, snapshot, "job copy backup is new")
            with pytest.raises(RefusedError, match="block job is running: copy"):
                machine.nodes(vm)
        finally:
            ask(vm, "block-job-cancel", {"device": "copy", "force": True})
            while ask(vm, "query-jobs"):
                pass
            ask(vm, "blockdev-del", {"node-name": "sink"})
        assert machine.binding(vm) == snapshot.binding


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
    with taken(outside, machine, doomed) as snapshot:
        outside.kill(doomed)
        outside.host.domains.start(doomed.uuid)
        reborn = outside.host.domains.get(doomed.uuid)
        refused(outside, machine, reborn, snapshot, "its QEMU process is another one")
        # The tag that the dead process left in the overlay goes through the new one.
        assert snapshot.tag in qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path)))
        machine.drop(reborn, snapshot)
        assert qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path))) == ()


def test_the_tag_goes_from_the_overlay_when_qemu_is_gone(
    outside: RealOutside, machine: QemuMachine, doomed: Vm
) -> None:
    with taken(outside, machine, doomed) as snapshot:
        outside.kill(doomed)
        machine.drop(None, snapshot)
        assert qemuimg.list_internal_snapshots(Path(str(doomed.disks[0].path))) == ()
        assert not Path(snapshot.folder).exists()


def test_what_a_killed_hvctl_left_is_cleared(outside: RealOutside, machine: QemuMachine, vm: Vm) -> None:
    """The switch that leaves RAM out still on, and a finished job not dismissed."""
    snapshot = outside.snapshot(vm, "torn")
    machine.prepare(vm, snapshot)
    ask(vm, "migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})
    ask(vm, "snapshot-delete", {"job-id": "hvctl-job", "tag": "none", "devices": [snapshot.vmstate_node]})
    assert not capability_is_off(vm)
    machine.drop(vm, snapshot)
    assert capability_is_off(vm)
    assert ask(vm, "query-jobs") == []
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

    def both_know(size: int) -> bool:
        return domains.balloon(vm.uuid).actual == size == domains.get(vm.uuid).allocation.memory

    # A guest that has just booted is still being brought down to its size.
    await_true(lambda: both_know(outside.spec().memory), "the guest has its size")
    domains.set_balloon(vm.uuid, vm.max_memory)
    await_true(lambda: both_know(vm.max_memory), "the balloon is empty")
    with taken(outside, machine, domains.get(vm.uuid)) as snapshot:
        less = domains.set_balloon(vm.uuid, snapshot.balloon - (32 << 20))
        await_true(lambda: both_know(less), "the balloon is in use")
        with paused(outside, vm):
            reset(machine, vm, snapshot)
            assert unequal_bytes(vm, snapshot) == 0
        machine.restore_balloon(domains.get(vm.uuid), snapshot)
        assert both_know(snapshot.balloon)
        domains.set_balloon(vm.uuid, less)
        machine.restore_balloon(domains.get(vm.uuid), snapshot)
        assert ask(vm, "query-balloon")["actual"] == snapshot.balloon
    outside.await_guest(vm.uuid)
    domains.set_balloon(vm.uuid, outside.spec().memory)
