"""ports.Storage: overlays and folders."""

from __future__ import annotations

import pytest

from hvctl.errors import NotFoundError
from hvctl.model.vm import Disk
from hvctl.ports import Host
from tests.contract.outside import MIB, Outside


def test_disks_come_and_go(host: Host, outside: Outside) -> None:
    spec = outside.spec()
    host.storage.make_disks(spec)
    try:
        assert spec.uuid in host.storage.folders()
        before = {d.path: outside.size(d.path) for d in spec.disks}
        host.storage.make_disks(spec)
        assert {d.path: outside.size(d.path) for d in spec.disks} == before
    finally:
        host.storage.remove(spec.uuid)
    assert spec.uuid not in host.storage.folders()
    assert not any(outside.exists(d.path) for d in spec.disks)
    host.storage.remove(spec.uuid)


def test_one_vms_folder_does_not_take_anothers(host: Host, outside: Outside) -> None:
    mine, other = outside.spec(), outside.spec()
    for spec in (mine, other):
        host.storage.make_disks(spec)
    try:
        host.storage.remove(mine.uuid)
        assert other.uuid in host.storage.folders()
        assert all(outside.exists(d.path) for d in other.disks)
    finally:
        host.storage.remove(other.uuid)


def test_the_space_of_a_disk_is_told_without_opening_it(host: Host, outside: Outside) -> None:
    spec = outside.spec()
    made = spec.disks[0]
    disk = Disk(made.target, made.name, made.path, "qcow2", True)
    with pytest.raises(NotFoundError):
        host.storage.space(disk)
    host.storage.make_disks(spec)
    try:
        space = host.storage.space(disk, "hvctl-of-no-snapshot")
        assert (space.size, space.after) == (made.size, None)
        assert space.taken < 1 * MIB
        assert space.left > 0
    finally:
        host.storage.remove(spec.uuid)
