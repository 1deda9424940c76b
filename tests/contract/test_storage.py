"""ports.Storage: overlays and folders."""

from __future__ import annotations

from hvctl.ports import Host
from tests.contract.outside import Outside


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
