"""ports.Archives, and what a load needs of the other ports: a process whose guest waits, disks that change places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.archive import Archive, Hardware, Placement
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, VmSpec
from hvctl.ports import Host
from tests.contract.outside import Outside
from tests.contract.test_machine import take


@pytest.fixture
def snapshot(outside: Outside, running: str) -> Iterator[Snapshot]:
    taken = take(outside, running, "base")
    yield taken
    outside.host.machine.drop(outside.host.domains.get(running), taken)
    outside.host.machine.release()


@pytest.fixture
def folder(outside: Outside, tmp_path: Path) -> Iterator[str]:
    tmp_path.chmod(0o755)
    yield str(tmp_path / "saved")
    outside.remove_archive(str(tmp_path / "saved"))


def saved(host: Host, running: str, snapshot: Snapshot, folder: str) -> tuple[Hardware, Archive]:
    vm = host.domains.get(running)
    hardware = host.machine.hardware(vm)
    host.machine.release()
    host.archives.write(vm.name, snapshot, hardware, folder)
    host.archives.publish(snapshot, folder)
    return hardware, host.archives.read(folder)


def test_an_archive_is_there_when_it_is_published(
    outside: Outside, host: Host, running: str, snapshot: Snapshot, folder: str
) -> None:
    archives = host.archives
    room = archives.room(snapshot, folder)
    assert 0 < room.need <= room.free
    with pytest.raises(NotFoundError):
        archives.read(folder)
    vm = host.domains.get(running)
    hardware = host.machine.hardware(vm)
    assert hardware == host.machine.hardware(vm)
    host.machine.release()
    wrote = archives.write(vm.name, snapshot, hardware, folder)
    assert wrote.ram > 0
    assert not archives.published(snapshot, folder)
    assert not outside.exists(folder)
    for _ in range(2):
        archives.publish(snapshot, folder)
    assert archives.published(snapshot, folder)
    archive = archives.read(folder)
    assert (archive.vm_name, archive.hardware, archive.snapshot.id) == (vm.name, hardware, snapshot.id)
    assert {d.target: d.overlay for d in archive.disks} == {d.target: d.path for d in vm.disks if d.writable}
    for disk in archive.disks:
        assert archives.backing(disk.overlay) == disk.backing
    archives.drop(snapshot, folder)
    assert archives.read(folder) == archive
    with pytest.raises(RefusedError):
        archives.room(snapshot, folder)
    with pytest.raises(RefusedError):
        archives.write(vm.name, snapshot, hardware, folder)
    assert all(r.need <= r.free for r in archives.load_rooms(archive))
    assert host.domains.get(running).state is State.RUNNING


def test_what_is_dropped_is_gone(host: Host, running: str, snapshot: Snapshot, folder: str) -> None:
    vm = host.domains.get(running)
    host.archives.write(vm.name, snapshot, Hardware("7.2.22", "pc", "tcg", "maximum"), folder)
    for _ in range(2):
        host.archives.drop(snapshot, folder)
    with pytest.raises(NotFoundError):
        host.archives.read(folder)


def test_an_import_is_no_snapshot_before_it_is_published(
    outside: Outside, host: Host, running: str, snapshot: Snapshot, folder: str
) -> None:
    saved(host, running, snapshot, folder)
    another = replace(outside.snapshot(host.domains.get(running), "another"), parent=None)
    host.machine.release()
    for _ in range(2):
        assert host.archives.import_snapshot(another, folder) > 0
    assert outside.exists(another.folder)
    assert [s.id for s in host.machine.snapshots(running)] == [snapshot.id]
    for _ in range(2):
        host.archives.remove_import(another)
    assert not outside.exists(another.folder)
    assert [s.id for s in host.machine.snapshots(running)] == [snapshot.id]


def test_a_guest_that_is_started_paused_waits(outside: Outside, host: Host, defined: VmSpec) -> None:
    for _ in range(2):
        host.domains.start(defined.uuid, paused=True)
        vm = host.domains.get(defined.uuid)
        assert vm.state is State.PAUSED
    assert vm.process is not None
    assert vm.ram
    host.machine.resume(vm)
    host.machine.release()
    outside.await_guest(defined.uuid)
    now = host.domains.get(defined.uuid)
    assert (now.state, now.process) == (State.RUNNING, vm.process)
    host.domains.start(defined.uuid, paused=True)
    assert host.domains.get(defined.uuid).state is State.RUNNING


def test_disks_change_places_and_back(
    outside: Outside, host: Host, running: str, snapshot: Snapshot, folder: str, defined: VmSpec
) -> None:
    """The saved disk of one VM in the place of another one's, which is off."""
    _, archive = saved(host, running, snapshot, folder)
    (overlay,) = (d.path for d in defined.disks)
    placement = Placement(f"{folder}/{archive.disks[0].file}", overlay)
    before = outside.size(overlay)
    assert host.storage.kept_disks(defined.uuid) is None
    for _ in range(2):
        host.storage.place_disks(defined.uuid, "one", [placement])
        assert host.storage.kept_disks(defined.uuid) == "one"
    placed = outside.size(overlay)
    host.storage.return_disks(defined.uuid, "another", [overlay])
    assert outside.size(overlay) == placed
    for _ in range(2):
        host.storage.return_disks(defined.uuid, "one", [overlay])
        assert (host.storage.kept_disks(defined.uuid), outside.size(overlay)) == (None, before)

    host.storage.place_disks(defined.uuid, "two", [placement])
    for _ in range(2):
        host.storage.release_disks(defined.uuid, "two", [overlay])
    placed = outside.size(overlay)
    host.storage.return_disks(defined.uuid, "two", [overlay])
    assert (host.storage.kept_disks(defined.uuid), outside.size(overlay)) == (None, placed)
