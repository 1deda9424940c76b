"""ports.Domains: what every implementation keeps, whatever is behind it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from hvctl.errors import GuestError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.vm import State, VmSpec
from hvctl.ports import Domains, Host
from tests.contract.outside import MIB, Outside, made

NOBODY = "00000000-0000-4000-8000-000000000000"
SECONDS = 5.0


def set_guest_vcpu(host: Host, vm: str, number: int, online: bool) -> None:
    wanted = [{"logical-id": number, "online": online}]
    assert host.domains.agent(vm, "guest-set-vcpus", {"vcpus": wanted}, SECONDS) == 1


# --- what there is


def test_facts_describe_the_host(host: Host) -> None:
    facts = host.domains.facts()
    assert facts.cpus > 0
    assert facts.memory > 256 * MIB
    assert facts.name
    assert facts.boot_id
    assert facts.cgroup in (1, 2)


def test_a_defined_vm_is_as_asked(host: Host, defined: VmSpec) -> None:
    vm = host.domains.get(defined.name)
    assert vm == host.domains.get(defined.uuid)
    assert (vm.uuid, vm.name, vm.state, vm.process) == (defined.uuid, defined.name, State.OFF, None)
    assert vm.allocation == Allocation(
        defined.vcpus,
        defined.memory,
        nics=tuple(NicLimit(n.mac) for n in defined.nics),
        disks=tuple(DiskLimit(d.target) for d in defined.disks),
    )
    assert (vm.max_vcpus, vm.max_memory) == (defined.max_vcpus, defined.max_memory)
    assert [(d.target, d.name, d.path, d.format, d.writable) for d in vm.disks] == [
        (d.target, d.name, d.path, "qcow2", True) for d in defined.disks
    ]
    assert [(n.mac, n.bridge) for n in vm.nics] == [(n.mac, n.bridge) for n in defined.nics]
    assert (vm.persistent, vm.missing, vm.record) == (True, (), None)
    assert vm.monitor == defined.monitor


def test_defining_twice_is_defining_once(host: Host, defined: VmSpec) -> None:
    before = host.domains.get(defined.uuid)
    host.domains.define(defined)
    assert host.domains.get(defined.uuid) == before
    assert [v.uuid for v in host.domains.list()].count(defined.uuid) == 1


def test_a_name_belongs_to_one_vm(host: Host, outside: Outside, defined: VmSpec) -> None:
    with pytest.raises(HvctlError):
        host.domains.define(replace(outside.spec(), name=defined.name))
    assert host.domains.get(defined.name).uuid == defined.uuid


def test_a_record_given_at_creation_is_read_back(host: Host, outside: Outside) -> None:
    spec = outside.spec()
    record = Record(Allocation(spec.vcpus, spec.memory), "micro", True, {"team": "<a & b>"})
    with made(outside, replace(spec, record=record)):
        assert host.domains.get(spec.uuid).record == record


def test_the_list_is_complete_and_sorted(host: Host, running: str, defined: VmSpec) -> None:
    vms = host.domains.list()
    assert {running, defined.uuid} <= {v.uuid for v in vms}
    assert [v.name for v in vms] == sorted(v.name for v in vms)
    assert next(v for v in vms if v.uuid == defined.uuid) == host.domains.get(defined.uuid)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.get(NOBODY),
        lambda d: d.get("nobody"),
        lambda d: d.start(NOBODY),
        lambda d: d.shutdown(NOBODY),
        lambda d: d.save(NOBODY),
        lambda d: d.pause(NOBODY),
        lambda d: d.resume(NOBODY),
        lambda d: d.set_vcpus(NOBODY, 1),
        lambda d: d.set_cpu_quota(NOBODY, 100),
        lambda d: d.set_cpu_weight(NOBODY, 100),
        lambda d: d.balloon(NOBODY),
        lambda d: d.set_balloon(NOBODY, 256 * MIB),
        lambda d: d.set_disk_limit(NOBODY, DiskLimit("vda", iops=10)),
        lambda d: d.disk_xml(NOBODY, "vda"),
        lambda d: d.unplug_disk(NOBODY, "vda"),
        lambda d: d.plug_disk(NOBODY, "vda", "<disk/>"),
        lambda d: d.set_record(NOBODY, None),
        lambda d: d.xml(NOBODY),
        lambda d: d.agent(NOBODY, "guest-ping", {}, 1.0),
        lambda d: d.console(NOBODY),
    ],
)
def test_an_absent_vm_is_not_found(host: Host, call: Callable[[Domains], object]) -> None:
    with pytest.raises(NotFoundError):
        call(host.domains)


def test_ending_an_absent_vm_is_done_already(host: Host) -> None:
    host.domains.destroy(NOBODY)
    host.domains.undefine(NOBODY)


# --- its life


def test_the_life_of_a_vm(host: Host, outside: Outside, defined: VmSpec) -> None:
    domains, vm = host.domains, defined.uuid
    domains.start(vm)
    first = domains.get(vm)
    assert first.state is State.RUNNING
    assert first.process is not None
    assert first.process.boot_id == domains.facts().boot_id
    assert outside.alive(first)
    domains.start(vm)
    assert domains.get(vm).process == first.process

    with pytest.raises(RefusedError):
        domains.undefine(vm)
    assert domains.get(vm).process == first.process

    domains.destroy(vm)
    domains.destroy(vm)
    off = domains.get(vm)
    assert (off.state, off.process, off.ram) == (State.OFF, None, ())
    assert not outside.alive(first)

    domains.start(vm)
    second = domains.get(vm)
    assert second.process != first.process
    domains.destroy(vm)
    domains.undefine(vm)
    domains.undefine(vm)
    with pytest.raises(NotFoundError):
        domains.get(vm)


def test_pausing_and_continuing(host: Host, running: str) -> None:
    process = host.domains.get(running).process
    host.domains.pause(running)
    host.domains.pause(running)
    paused = host.domains.get(running)
    assert (paused.state, paused.reason, paused.process) == (State.PAUSED, "user", process)
    host.domains.resume(running)
    host.domains.resume(running)
    assert (host.domains.get(running).state, host.domains.get(running).process) == (State.RUNNING, process)


def test_what_is_off_neither_pauses_nor_continues(host: Host, defined: VmSpec) -> None:
    for call in (host.domains.pause, host.domains.resume):
        with pytest.raises(RefusedError):
            call(defined.uuid)
    assert host.domains.get(defined.uuid).state is State.OFF


def test_waiting_for_a_state(host: Host, running: str) -> None:
    assert host.domains.wait_state(running, frozenset({State.RUNNING}), SECONDS) is State.RUNNING
    assert host.domains.wait_state(running, frozenset({State.OFF}), 0.1) is State.RUNNING


def test_a_guest_powers_off_when_asked(host: Host, outside: Outside) -> None:
    with made(outside, outside.spec(), start=True) as vm:
        host.domains.shutdown(vm)
        assert host.domains.wait_state(vm, frozenset({State.OFF}), 30.0) is State.OFF
        assert host.domains.get(vm).process is None


def test_a_saved_guest_goes_on_where_it_was(host: Host, outside: Outside) -> None:
    with made(outside, outside.spec(), start=True) as vm:
        outside.spoil(vm)
        work = outside.content(vm)
        host.domains.save(vm)
        host.domains.save(vm)
        saved = host.domains.get(vm)
        assert (saved.state, saved.reason, saved.process) == (State.OFF, "saved", None)
        with pytest.raises(RefusedError):
            host.domains.start(vm, paused=True)
        host.domains.start(vm)
        outside.await_guest(vm)
        assert host.domains.get(vm).state is State.RUNNING
        assert outside.content(vm) == work


def test_a_vm_whose_process_died_is_off(host: Host, outside: Outside, defined: VmSpec) -> None:
    host.domains.start(defined.uuid)
    outside.kill(host.domains.get(defined.uuid))
    assert host.domains.get(defined.uuid).state in (State.OFF, State.CRASHED)
    assert host.domains.get(defined.uuid).process is None
    host.domains.destroy(defined.uuid)


# --- allocation


@pytest.mark.parametrize("percent", [50, 150, None])
def test_a_cpu_quota_holds(host: Host, running: str, percent: int | None) -> None:
    host.domains.set_cpu_quota(running, percent)
    host.domains.set_cpu_quota(running, percent)
    assert host.domains.get(running).allocation.cpu_quota == percent


@pytest.mark.parametrize("weight", [1, 50, 100, 101, 10000, None])
def test_a_cpu_weight_holds(host: Host, running: str, weight: int | None) -> None:
    host.domains.set_cpu_weight(running, weight)
    host.domains.set_cpu_weight(running, weight)
    assert host.domains.get(running).allocation.cpu_weight == (None if weight == 100 else weight)


@pytest.mark.parametrize(
    "limit",
    [
        DiskLimit("vda", iops=100),
        DiskLimit("vda", iops=100, rate=10 * MIB),
        DiskLimit("vda", iops=100, iops_burst=500, burst_seconds=5),
        DiskLimit("vda", rate=10 * MIB, rate_burst=20 * MIB),
        DiskLimit("vda"),
    ],
)
def test_a_disk_limit_holds(host: Host, running: str, limit: DiskLimit) -> None:
    host.domains.set_disk_limit(running, limit)
    host.domains.set_disk_limit(running, limit)
    seen = host.domains.get(running).allocation.disk("vda")
    if limit.burst_seconds is None and (limit.iops_burst or limit.rate_burst):
        seen = replace(seen, burst_seconds=None)  # QEMU's own default may be told: one second
    assert seen == limit


def test_a_limit_of_no_disk_is_refused(host: Host, running: str) -> None:
    with pytest.raises(RefusedError):
        host.domains.set_disk_limit(running, DiskLimit("vdz", iops=10))


def test_vcpus_come_and_go(host: Host, outside: Outside) -> None:
    with made(outside, outside.spec(), start=True) as vm:
        host.domains.set_vcpus(vm, 2)
        host.domains.set_vcpus(vm, 2)
        assert host.domains.get(vm).allocation.vcpus == 2
        outside.await_vcpus(vm, 2)
        set_guest_vcpu(host, vm, 1, False)
        for _ in range(2):
            try:
                host.domains.set_vcpus(vm, 1)
            except GuestError:
                # As an emulated guest does; then the truth is told.
                assert host.domains.get(vm).allocation.vcpus == 2
            else:
                assert host.domains.get(vm).allocation.vcpus == 1


def test_no_more_vcpus_than_the_maximum(host: Host, running: str) -> None:
    with pytest.raises(RefusedError):
        host.domains.set_vcpus(running, host.domains.get(running).max_vcpus + 1)
    assert host.domains.get(running).allocation.vcpus == 1


def test_the_balloon_gives_and_takes(host: Host, running: str) -> None:
    before = host.domains.get(running).allocation.memory
    statistics = host.domains.balloon(running)
    assert statistics.reported
    assert statistics.actual == before
    assert statistics.usable is not None
    assert 0 < statistics.usable < before
    for target in (before - 32 * MIB, before):
        assert host.domains.set_balloon(running, target) == target
        assert host.domains.set_balloon(running, target) == target
        assert host.domains.get(running).allocation.memory == target
        assert host.domains.balloon(running).actual == target


def test_what_is_set_while_off_holds_at_the_next_start(host: Host, outside: Outside, defined: VmSpec) -> None:
    domains, vm = host.domains, defined.uuid
    domains.set_vcpus(vm, 2)
    domains.set_balloon(vm, defined.memory - 64 * MIB)
    domains.set_cpu_quota(vm, 75)
    domains.set_cpu_weight(vm, 200)
    domains.set_disk_limit(vm, DiskLimit("vda", iops=50))
    wanted = Allocation(2, defined.memory - 64 * MIB, 75, 200, (), (DiskLimit("vda", iops=50),))
    assert replace(domains.get(vm).allocation, nics=()) == wanted
    domains.start(vm)
    outside.await_guest(vm)
    domains.set_balloon(vm, wanted.memory)
    assert replace(domains.get(vm).allocation, nics=()) == wanted


def test_what_is_set_while_running_holds_at_the_next_start(host: Host, defined: VmSpec) -> None:
    domains, vm = host.domains, defined.uuid
    domains.start(vm)
    domains.set_cpu_quota(vm, 75)
    domains.set_cpu_weight(vm, 200)
    domains.set_disk_limit(vm, DiskLimit("vda", iops=50))
    domains.set_vcpus(vm, 2)
    before = all_but_memory(host, vm)
    domains.destroy(vm)
    assert all_but_memory(host, vm) == before
    domains.start(vm)
    assert all_but_memory(host, vm) == before


def all_but_memory(host: Host, vm: str) -> Allocation:
    """A guest that just booted still has all of its memory."""
    return replace(host.domains.get(vm).allocation, memory=0)


# --- the record and the definition


def test_a_record_is_kept_whether_the_vm_runs_or_not(host: Host, running: str, defined: VmSpec) -> None:
    limits = (NicLimit("52:54:00:00:00:01", 8_000_000, None),)
    record = Record(Allocation(1, 256 * MIB, 50, 100, limits, (DiskLimit("vda", iops=9),)), "micro", True, {"a": "b"})
    for vm in (running, defined.uuid):
        host.domains.set_record(vm, record)
        host.domains.set_record(vm, record)
        assert host.domains.get(vm).record == record
        host.domains.set_record(vm, None)
        host.domains.set_record(vm, None)
        assert host.domains.get(vm).record is None


def test_a_record_set_while_running_outlives_the_process(host: Host, defined: VmSpec) -> None:
    record = Record(Allocation(1, 256 * MIB))
    host.domains.start(defined.uuid)
    host.domains.set_record(defined.uuid, record)
    host.domains.destroy(defined.uuid)
    assert host.domains.get(defined.uuid).record == record


def test_a_definition_goes_back_as_it_came(host: Host, defined: VmSpec) -> None:
    before = host.domains.get(defined.uuid)
    text = host.domains.xml(defined.uuid)
    assert defined.uuid in text
    assert defined.name in text
    host.domains.redefine(defined.uuid, text)
    assert host.domains.get(defined.uuid) == before
    assert host.domains.xml(defined.uuid) == text


# --- the guest


def test_the_agent_answers(host: Host, running: str) -> None:
    assert host.domains.agent(running, "guest-ping", {}, SECONDS) == {}
    commands = host.domains.agent(running, "guest-info", {}, SECONDS)["supported_commands"]
    assert {"guest-exec", "guest-set-time", "guest-set-vcpus"} <= {c["name"] for c in commands}
    started = host.domains.agent(running, "guest-exec", {"path": "true", "arg": [], "capture-output": True}, SECONDS)
    assert started["pid"] > 0


def test_a_command_the_agent_does_not_know(host: Host, running: str) -> None:
    with pytest.raises(GuestError):
        host.domains.agent(running, "guest-no-such-thing", {}, SECONDS)


def test_vcpu_zero_stays(host: Host, outside: Outside, running: str) -> None:
    with pytest.raises(GuestError):
        host.domains.agent(running, "guest-set-vcpus", {"vcpus": [{"logical-id": 0, "online": False}]}, SECONDS)
    outside.await_vcpus(running, 1)


def test_nobody_answers_in_a_vm_that_is_off(host: Host, defined: VmSpec) -> None:
    with pytest.raises(UnreachableError):
        host.domains.agent(defined.uuid, "guest-ping", {}, SECONDS)


def test_the_console_of_a_running_vm(host: Host, running: str, defined: VmSpec) -> None:
    assert host.domains.console(running).startswith("/dev/pts/")
    with pytest.raises(RefusedError):
        host.domains.console(defined.uuid)


def test_names_are_compared_exactly(host: Host, defined: VmSpec) -> None:
    for ref in (defined.name.upper(), defined.name[:-1], str(uuid.uuid4())):
        with pytest.raises(NotFoundError):
            host.domains.get(ref)
