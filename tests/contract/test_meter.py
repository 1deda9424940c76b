"""The meter: what a fake host and a real one both say of the VMs that run."""

from __future__ import annotations

import pytest

from hvctl.decide.rates import happened, used
from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.meter import Reading, VmReading
from hvctl.model.sample import EventKind
from hvctl.model.vm import VmSpec
from hvctl.ports import Host
from tests.contract.outside import MIB, Outside, made
from tests.contract.real import await_true


def of(reading: Reading, uuid: str) -> VmReading | None:
    return next((vm for vm in reading.vms if vm.uuid == uuid), None)


def read(host: Host, uuid: str) -> VmReading:
    found = of(host.meter.read(), uuid)
    assert found is not None
    return found


def test_running_vms_alone_by_name(host: Host, running: str, defined: VmSpec) -> None:
    reading = host.meter.read()
    assert of(reading, running) is not None
    assert of(reading, defined.uuid) is None
    assert [vm.name for vm in reading.vms] == sorted(vm.name for vm in reading.vms)
    assert {vm.uuid for vm in reading.vms} >= {v.uuid for v in host.domains.list() if v.uuid == running}


def test_what_a_vm_has_is_what_its_domain_says(host: Host, running: str) -> None:
    vm, seen = host.domains.get(running), read(host, running)
    assert (seen.name, seen.vcpus) == (vm.name, vm.allocation.vcpus)
    assert [d.target for d in seen.disks or ()] == [d.target for d in vm.disks]
    assert [n.tap for n in seen.nics or ()] == [n.tap for n in vm.nics]
    assert [number for number, _ in seen.vcpu_times] == list(range(vm.allocation.vcpus))
    assert seen.rss is not None
    assert seen.rss > 0


def test_the_host_has_memory_left_that_it_does_not_make_up(host: Host) -> None:
    assert 0 < host.meter.available() <= host.domains.facts().memory


def test_clocks_go_on_and_counters_do_not_fall(host: Host, outside: Outside, running: str) -> None:
    first = host.meter.read()
    outside.spoil(running)
    second = host.meter.read()
    assert second.clock > first.clock
    assert second.at > first.at
    assert first.boot_id == second.boot_id == host.domains.facts().boot_id
    assert first.took >= 0
    before, after = of(first, running), of(second, running)
    assert before is not None
    assert after is not None
    assert before.life == after.life
    assert before.cpu is not None
    assert after.cpu is not None
    assert after.cpu >= before.cpu
    assert all(a[1:] >= b[1:] for a, b in zip(after.disks or (), before.disks or (), strict=True))
    assert all(a[1:] >= b[1:] for a, b in zip(after.nics or (), before.nics or (), strict=True))
    # Other tests start VMs on the same host meanwhile.
    assert [e for e in happened(first, second) if e.vm_uuid == running] == []


def test_the_guests_own_figures_are_within_what_it_has(host: Host, running: str) -> None:
    seen = read(host, running)
    if seen.available is None:
        pytest.skip("this guest has not reported yet")
    assert seen.memory is not None
    assert seen.usable is not None
    assert seen.unused is not None
    assert 0 < seen.usable <= seen.available <= seen.memory
    assert 0 < seen.unused <= seen.available


def test_a_paused_vm_uses_nothing_and_is_there(host: Host, running: str) -> None:
    host.domains.pause(running)
    try:
        first = read(host, running)
        second = read(host, running)
        assert first.vcpu_times == second.vcpu_times
    finally:
        host.domains.resume(running)


def test_another_process_is_another_life(host: Host, outside: Outside) -> None:
    with made(outside, outside.spec(), start=True) as vm:
        first = host.meter.read()
        outside.kill(host.domains.get(vm))
        gone = host.meter.read()
        assert of(gone, vm) is None
        assert [e.kind for e in happened(first, gone) if e.vm_uuid == vm] == [EventKind.STOP]
        host.domains.start(vm)
        again = host.meter.read()
        before, after = of(first, vm), of(again, vm)
        assert before is not None
        assert after is not None
        assert before.life != after.life
        assert [e.kind for e in happened(first, again) if e.vm_uuid == vm] == [EventKind.STOP, EventKind.START]
        assert vm not in {s.uuid for s in used(first, again, float("inf")).samples}


def test_dirtied_memory(host: Host, running: str, defined: VmSpec) -> None:
    assert 0 <= host.meter.dirty_rate(running, 1) < 1 << 40
    with pytest.raises(RefusedError):
        host.meter.dirty_rate(defined.uuid, 1)
    with pytest.raises(NotFoundError):
        host.meter.dirty_rate("00000000-0000-4000-8000-000000000000", 1)


def test_what_it_cannot_tell_is_said_and_is_none(host: Host, running: str) -> None:
    lacks, seen = " ".join(host.meter.lacks()), read(host, running)
    assert ("hardware counters" in lacks) == (seen.hardware is None)
    assert all("(" in lack and lack.endswith(")") for lack in host.meter.lacks()), "each has its reason"


def test_memory_follows_the_balloon(host: Host, running: str) -> None:
    """QEMU tells libvirt of a balloon that moves once a second at most."""
    for target in (224 * MIB, 256 * MIB):
        assert host.domains.set_balloon(running, target) == target
        await_true(lambda: read(host, running).memory == target, f"the reading follows to {target}")  # noqa: B023
    assert host.domains.get(running).allocation.memory == target
