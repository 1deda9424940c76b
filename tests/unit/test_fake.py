"""The fake host where the contract does not reach: its file, its faults, and guests that misbehave."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.errors import (
    DeadlineError,
    GuestError,
    HvctlError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm
from hvctl.ports import Host

MIB = 1 << 20


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path / "state.json")


@pytest.fixture
def host(world: FakeWorld) -> Host:
    return open_fake(world.uri)


# --- the file

WRITER = """
import sys
from hvctl.adapters.fake import open_fake
host = open_fake(sys.argv[1])
vm = host.domains.get("victim").uuid
quota = host.domains.get("victim").allocation.cpu_quota or 0
while True:
    quota += 1
    host.domains.set_cpu_quota(vm, quota)
    print(quota, flush=True)
"""


def test_a_killed_writer_leaves_what_it_said_was_done(world: FakeWorld) -> None:
    world.add_vm("victim")
    for lines in (1, 2, 5, 11, 23, 47):
        with subprocess.Popen([sys.executable, "-c", WRITER, world.uri], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(lines)]
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.readlines()
        last = int(said[-1])
        assert world.vm("victim").allocation.cpu_quota in (last, last + 1)
    assert {p.name for p in world.path.parent.iterdir()} <= {"state.json", "state.json.lock", "state.json.new"}


HALF_WRITER = """
import resource, signal, sys
from hvctl.adapters.fake import open_fake
host = open_fake(sys.argv[1])
vm = host.domains.get("victim").uuid
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
host.domains.set_cpu_quota(vm, 77)
"""


def test_a_writer_killed_in_the_middle_of_the_file_changed_nothing(world: FakeWorld) -> None:
    """The kernel ends it when the file it writes reaches a size."""
    world.add_vm("victim")
    before = world.read()
    for limit in (1, world.path.stat().st_size // 2):
        done = subprocess.run([sys.executable, "-c", HALF_WRITER, world.uri, str(limit)], check=False)
        assert done.returncode == -signal.SIGXFSZ
        assert world.read() == before
    open_fake(world.uri).domains.set_cpu_quota(next(iter(before.vms)), 77)
    assert world.vm("victim").allocation.cpu_quota == 77


def test_no_change_of_many_writers_is_lost(world: FakeWorld) -> None:
    def work(number: int) -> None:
        host = open_fake(world.uri)
        for i in range(20):
            FakeWorld(world.path).add_vm(f"vm-{number}-{i}", nics=0, disks=())
            host.domains.set_cpu_quota(host.domains.get(f"vm-{number}-{i}").uuid, 50)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    vms = open_fake(world.uri).domains.list()
    assert len(vms) == 80
    assert {v.allocation.cpu_quota for v in vms} == {50}
    assert len({v.process for v in vms}) == 80


def test_what_others_change_is_seen(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a")
    assert host.domains.get(vm).state is State.RUNNING
    world.pause(vm)
    assert host.domains.get(vm).state is State.PAUSED


def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    assert open_fake(f"fake://{tmp_path}/new.json").domains.list() == ()
    with pytest.raises(UnreachableError):
        open_fake(f"fake://{tmp_path}/no/folder.json").domains.list()
    (tmp_path / "bad.json").write_text('{"vms": 7}')
    with pytest.raises(UnreachableError):
        open_fake(f"fake://{tmp_path}/bad.json").domains.list()
    for uri in ("fake://state.json", "qemu:///system"):
        with pytest.raises(UsageError):
            open_fake(uri)


# --- a guest's parts and their moments


def taken(world: FakeWorld, host: Host, name: str) -> tuple[Vm, Snapshot]:
    """A paused VM and a whole snapshot of it."""
    vm = host.domains.get(name)
    snapshot = described(host, vm, "1")
    store(host, vm, snapshot)
    return vm, snapshot


def described(host: Host, vm: Vm, id: str, **parts: Any) -> Snapshot:
    binding, targets = host.machine.binding(vm), host.machine.nodes(vm)
    whole = Snapshot(
        id, "base", vm.uuid, f"2026-01-01T00:00:0{id}Z", binding, f"hv-{id}", targets, f"hv-{id}", f"/s/{id}", vm.ram,
        vm.allocation.memory, 1, 0,
    )  # fmt: skip
    return replace(whole, **parts)


def store(host: Host, vm: Vm, snapshot: Snapshot) -> None:
    host.machine.prepare(vm, snapshot)
    host.machine.pause(vm)
    host.machine.save_state(vm, snapshot)
    host.machine.copy_ram(vm, snapshot)
    host.machine.publish(snapshot)


def continue_and_spoil(world: FakeWorld, host: Host, vm: Vm) -> None:
    host.domains.resume(vm.uuid)
    world.spoil(vm.uuid)
    host.domains.pause(vm.uuid)


WHOLE = ("restore_ram", "load_state", "restore_ram")


@pytest.mark.parametrize(
    ("steps", "torn"),
    [
        ((), False),
        (WHOLE, False),
        (WHOLE + WHOLE, False),
        (WHOLE[:1], True),
        (WHOLE[:2], True),
        ((*WHOLE[:2], *WHOLE), False),
        (("load_state",), True),
    ],
)
def test_a_guest_of_mixed_moments_is_marked_for_ever(
    world: FakeWorld, host: Host, steps: tuple[str, ...], torn: bool
) -> None:
    world.add_vm("a", disks=("root", "data"))
    vm, snapshot = taken(world, host, "a")
    before = world.content("a")
    continue_and_spoil(world, host, vm)
    for step in steps:
        try:
            getattr(host.machine, step)(vm, snapshot)
        except GuestError:
            assert step == "load_state"
    host.domains.resume(vm.uuid)
    assert world.vm("a").torn is torn
    assert (world.content("a") == before) is (bool(steps) and not torn)
    host.domains.pause(vm.uuid)
    host.domains.resume(vm.uuid)
    assert world.vm("a").torn is torn


def test_half_a_copy_of_ram_is_noticed(world: FakeWorld, host: Host) -> None:
    """As kill -9 between two pages leaves it, of the copy out and of the copy back."""
    world.add_vm("a")
    vm, snapshot = taken(world, host, "a")
    continue_and_spoil(world, host, vm)
    world.fail("restore_ram", "HvctlError", after=True)
    with pytest.raises(HvctlError):
        host.machine.restore_ram(vm, snapshot)
    with pytest.raises(GuestError):
        host.machine.load_state(vm, snapshot)

    world.add_vm("b")
    world.fail("copy_ram", "enospc", after=True)
    with pytest.raises(HvctlError, match="space"):
        taken(world, host, "b")


def test_a_snapshot_of_two_moments_gives_a_torn_guest(world: FakeWorld, host: Host) -> None:
    world.add_vm("a")
    vm, snapshot = taken(world, host, "a")
    continue_and_spoil(world, host, vm)
    host.machine.copy_ram(vm, snapshot)
    for step in WHOLE:
        getattr(host.machine, step)(vm, snapshot)
    host.domains.resume(vm.uuid)
    assert world.vm("a").torn


@pytest.mark.parametrize("change", ["plug", "vcpus", "restart"])
def test_a_snapshot_fits_one_machine(world: FakeWorld, host: Host, change: str) -> None:
    world.add_vm("a")
    vm, snapshot = taken(world, host, "a")
    host.domains.resume(vm.uuid)
    if change == "plug":
        world.plug("a", "usb0")
    elif change == "vcpus":
        host.domains.set_vcpus(vm.uuid, 2)
    else:
        world.destroy("a")
        world.start("a")
    vm = host.domains.get("a")
    assert host.machine.binding(vm) != snapshot.binding
    host.domains.pause(vm.uuid)
    for touch in (host.machine.restore_ram, host.machine.load_state):
        with pytest.raises(RefusedError):
            touch(vm, snapshot)
    assert not world.vm("a").dead


def test_a_dead_machine_stays_dead(world: FakeWorld, host: Host) -> None:
    world.add_vm("a")
    vm, snapshot = taken(world, host, "a")
    continue_and_spoil(world, host, vm)
    with pytest.raises(GuestError):
        host.machine.load_state(vm, snapshot)
    host.machine.restore_ram(vm, snapshot)
    with pytest.raises(GuestError):
        host.machine.load_state(vm, snapshot)
    assert world.vm("a").dead


def test_a_reboot_of_the_host_takes_what_lives_in_memory(world: FakeWorld, host: Host) -> None:
    world.add_vm("a")
    taken(world, host, "a")
    world.add_vm("transient", persistent=False)
    old = host.domains.facts().boot_id
    world.reboot_host()
    assert [(v.name, v.state) for v in host.domains.list()] == [("a", State.OFF)]
    assert host.machine.snapshots() == []
    assert host.domains.facts().boot_id != old
    world.start("a")
    assert world.vm("a").process is not None


# --- scripted failures


def test_a_script_fires_at_its_call_and_is_used_up(world: FakeWorld, host: Host) -> None:
    a, b = world.add_vm("a"), world.add_vm("b")
    world.fail("set_cpu_quota", "DeadlineError", nth=2, times=2, uuid=a)
    host.domains.set_cpu_quota(a, 10)
    host.domains.set_cpu_quota(b, 10)
    for _ in range(2):
        with pytest.raises(DeadlineError):
            host.domains.set_cpu_quota(a, 20)
    assert host.domains.get(a).allocation.cpu_quota == 10
    host.domains.set_cpu_quota(a, 30)
    assert world.read().scripts == []


def test_an_effect_may_have_happened_when_its_deadline_passed(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a")
    world.fail("set_cpu_quota", "DeadlineError", after=True)
    with pytest.raises(DeadlineError):
        host.domains.set_cpu_quota(vm, 20)
    assert host.domains.get(vm).allocation.cpu_quota == 20


def test_reading_calls_fail_too(world: FakeWorld, host: Host) -> None:
    world.add_vm("a")
    world.fail("list", "UnreachableError")
    with pytest.raises(UnreachableError):
        host.domains.list()
    assert len(host.domains.list()) == 1


def test_somebody_else_acts_just_before_a_call(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a")
    world.script("set_cpu_quota", outside="pause")
    host.domains.set_cpu_quota(vm, 20)
    assert host.domains.get(vm).state is State.PAUSED
    transient = world.add_vm("b", persistent=False)
    world.script("set_cpu_quota", outside="destroy")
    with pytest.raises(NotFoundError):
        host.domains.set_cpu_quota(transient, 20)


def test_nobody_answers_while_libvirt_is_down(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a")
    world.set_libvirt_down(True)
    for call in (host.domains.list, host.domains.facts, lambda: host.domains.destroy(vm)):
        with pytest.raises(UnreachableError):
            call()
    world.set_libvirt_down(False)
    assert host.domains.get(vm).state is State.RUNNING


# --- guests


@pytest.mark.parametrize(
    ("behaviour", "reached"),
    [
        ({}, 128 * MIB),
        ({"balloon_floor": 200 * MIB}, 200 * MIB),
        ({"balloon_driver": False}, 256 * MIB),
    ],
)
def test_how_far_a_balloon_goes(world: FakeWorld, host: Host, behaviour: dict[str, Any], reached: int) -> None:
    vm = world.add_vm("a", memory=256 * MIB, behaviour=behaviour)
    assert host.domains.set_balloon(vm, 128 * MIB) == reached
    assert host.domains.get(vm).allocation.memory == reached


@pytest.mark.parametrize("behaviour", [{"balloon_driver": False}, {"balloon_stats": False}])
def test_a_guest_without_statistics(world: FakeWorld, host: Host, behaviour: dict[str, Any]) -> None:
    vm = world.add_vm("a", behaviour=behaviour)
    assert not host.domains.balloon(vm).reported


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ({"agent": "absent"}, UnreachableError),
        ({"agent": "silent"}, DeadlineError),
        ({"refuses": ["guest-get-vcpus"]}, GuestError),
    ],
)
def test_agents_that_do_not_help(
    world: FakeWorld, host: Host, behaviour: dict[str, Any], error: type[HvctlError]
) -> None:
    vm = world.add_vm("a", behaviour=behaviour)
    with pytest.raises(error):
        host.domains.agent(vm, "guest-get-vcpus", {}, 1.0)


def test_an_agent_that_lies(world: FakeWorld, host: Host) -> None:
    hostile = world.add_vm("a", behaviour={"agent": "hostile"})
    assert not isinstance(host.domains.agent(hostile, "guest-get-vcpus", {}, 1.0), list)
    scripted = world.add_vm("b", behaviour={"answers": {"guest-get-vcpus": [{"logical-id": -1}]}})
    assert host.domains.agent(scripted, "guest-get-vcpus", {}, 1.0) == [{"logical-id": -1}]


def test_an_agent_is_away_for_a_while_after_a_load(world: FakeWorld, host: Host) -> None:
    world.add_vm("a", behaviour={"agent_gap": 2})
    vm, snapshot = taken(world, host, "a")
    for step in WHOLE:
        getattr(host.machine, step)(vm, snapshot)
    host.domains.resume(vm.uuid)
    for _ in range(2):
        with pytest.raises(UnreachableError):
            host.domains.agent(vm.uuid, "guest-ping", {}, 1.0)
    assert host.domains.agent(vm.uuid, "guest-ping", {}, 1.0) == {}


@pytest.mark.parametrize("guest", ["online", "keeps"])
def test_a_vcpu_the_guest_keeps(world: FakeWorld, host: Host, guest: str) -> None:
    vm = world.add_vm("a", vcpus=3, behaviour={"keeps_vcpus": guest == "keeps"})
    if guest == "keeps":
        host.domains.agent(vm, "guest-set-vcpus", {"vcpus": [{"logical-id": 2, "online": False}]}, 1.0)
    with pytest.raises(GuestError):
        host.domains.set_vcpus(vm, 1)
    assert host.domains.get(vm).allocation.vcpus == 3


def test_vcpus_that_wait_for_the_agent(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a", behaviour={"onlines_vcpus": False})
    host.domains.set_vcpus(vm, 2)
    assert [c["online"] for c in host.domains.agent(vm, "guest-get-vcpus", {}, 1.0)] == [True, False]


def test_a_guest_that_does_not_hear_shutdown(world: FakeWorld, host: Host) -> None:
    vm = world.add_vm("a", behaviour={"ignores_shutdown": True})
    host.domains.shutdown(vm)
    assert host.domains.wait_state(vm, frozenset({State.OFF}), 30.0) is State.RUNNING
    host.domains.agent(vm, "guest-shutdown", {}, 1.0)
    assert host.domains.get(vm).state is State.OFF
