"""The allocation planner: shrinks first, is safe in every prefix, converges from any of them, never starves a guest."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.allocate import goal_of, memory_floor, plan_allocation, promised_after, with_parts
from hvctl.model import plan as p
from hvctl.model.allocation import Allocation, Change, DiskChange, DiskLimit, NicChange, Record, resources
from hvctl.model.stepwords import step_name
from hvctl.model.vm import Balloon, State, Vm
from unit.vms import MACS, MAX_MEMORY, MIB, allocations, changes, vm_with

IDLE = Balloon(MAX_MEMORY, MAX_MEMORY, MAX_MEMORY, MAX_MEMORY, age=1)


def advance(vm: Vm, step: p.Step) -> Vm:
    """What a perfect host makes of one step."""
    a = vm.allocation
    match step:
        case p.SetVcpus(_, count):
            a = replace(a, vcpus=count)
        case p.SetMemory(_, target):
            a = replace(a, memory=target)
        case p.SetCpuQuota(_, percent):
            a = replace(a, cpu_quota=percent)
        case p.SetCpuWeight(_, weight):
            a = replace(a, cpu_weight=weight)
        case p.SetNicLimit(_, limit):
            a = replace(a, nics=tuple(limit if n.mac == limit.mac else n for n in a.nics))
        case p.SetDiskLimit(_, limit):
            a = replace(a, disks=tuple(limit if d.target == limit.target else d for d in a.disks))
        case p.SetRecord(_, record):
            return replace(vm, record=record)
    return replace(vm, allocation=a)


def planned(vm: Vm, goal: Allocation) -> p.Plan:
    plan = plan_allocation(
        vm, goal, Record(goal), replace(IDLE, actual=vm.allocation.memory, usable=vm.allocation.memory), margin=0
    )
    assert isinstance(plan, p.Plan), plan
    return plan


@given(allocations, allocations)
def test_the_plan_leads_to_the_goal_and_then_there_is_nothing_to_do(now: Allocation, goal: Allocation) -> None:
    vm = vm_with(now)
    for step in planned(vm, goal).effects:
        vm = advance(vm, step)
    assert vm.allocation == goal
    assert planned(vm, goal).steps == ()


@given(allocations, allocations, st.data())
def test_any_interrupted_prefix_is_safe_and_planning_again_converges(
    now: Allocation, goal: Allocation, data: st.DataObject
) -> None:
    vm = vm_with(now)
    most = resources(now).largest(resources(goal))
    steps = planned(vm, goal).effects
    for step in steps[: data.draw(st.integers(0, len(steps)))]:
        vm = advance(vm, step)
        # A limit that is taken away counts as nothing, so only what is counted can be compared.
        held = resources(vm.allocation)
        assert held.cpu <= most.cpu
        assert held.memory <= most.memory
        for nic in vm.allocation.nics:
            before, after = now.nic(nic.mac), goal.nic(nic.mac)
            for way in ("inbound", "outbound"):
                bounds = [getattr(before, way), getattr(after, way)]
                if None not in bounds:
                    assert getattr(nic, way) is not None
                    assert getattr(nic, way) <= max(bounds)
        for disk in vm.allocation.disks:
            bounds = [now.disk(disk.target).iops, goal.disk(disk.target).iops]
            if None not in bounds:
                assert disk.iops is not None
                assert disk.iops <= max(bounds)
    for step in planned(vm, goal).effects:
        vm = advance(vm, step)
    assert vm.allocation == goal


@given(allocations, changes)
def test_a_change_touches_only_what_it_names(now: Allocation, change: Change) -> None:
    goal = goal_of(vm_with(now), change)
    assert isinstance(goal, Allocation)
    for name in ("vcpus", "memory", "cpu_quota", "cpu_weight"):
        asked = getattr(change, name)
        assert getattr(goal, name) == (getattr(now, name) if asked == Change().vcpus else asked)
    if not change.nics:
        assert goal.nics == now.nics
    if not change.disks:
        assert goal.disks == now.disks


@given(st.integers(16, 1024), st.integers(0, 1024), st.integers(0, 64))
def test_a_guest_keeps_what_it_uses_and_a_margin(target: int, used: int, margin: int) -> None:
    now = Allocation(1, MAX_MEMORY)
    balloon = Balloon(MAX_MEMORY, MAX_MEMORY, 0, MAX_MEMORY - used * MIB, age=0)
    plan = plan_allocation(vm_with(now), replace(now, memory=target * MIB), None, balloon, margin=margin * MIB)
    fits = target >= min(used + margin, 1024)
    assert isinstance(plan, p.Plan) == fits
    kind = plan_allocation(
        vm_with(now), replace(now, memory=target * MIB), None, balloon, margin=margin * MIB, best_effort=True
    )
    assert isinstance(kind, p.Plan)
    for step in kind.effects:
        assert isinstance(step, p.SetMemory)
        assert step.target >= min(used + margin, 1024) * MIB


@pytest.mark.parametrize("balloon", [None, Balloon(MAX_MEMORY), replace(IDLE, age=300)])
def test_without_statistics_only_force_shrinks(balloon: Balloon | None) -> None:
    vm = vm_with(Allocation(1, MAX_MEMORY))
    goal = replace(vm.allocation, memory=256 * MIB)
    assert isinstance(plan_allocation(vm, goal, None, balloon, margin=0), p.Refusal)
    assert isinstance(plan_allocation(vm, goal, None, balloon, margin=0, force=True), p.Plan)
    grown = plan_allocation(vm_with(goal), vm.allocation, None, balloon, margin=0)
    assert isinstance(grown, p.Plan)


def test_lies_of_the_guest_never_lower_the_floor_below_its_claim() -> None:
    assert memory_floor(replace(IDLE, usable=10 * MAX_MEMORY), 0) == IDLE.actual - 10 * MAX_MEMORY
    # A negative floor means "as low as asked", which goal_of still bounds.
    assert isinstance(goal_of(vm_with(Allocation(1, MAX_MEMORY)), Change(memory=MIB)), p.Refusal)


def test_an_off_vm_needs_no_balloon_and_no_tap() -> None:
    vm = vm_with(Allocation(1, MAX_MEMORY), State.OFF)
    goal = replace(vm.allocation, memory=256 * MIB)
    plan = plan_allocation(vm, goal, None, None, margin=0)
    assert isinstance(plan, p.Plan)
    assert [type(s) for s in plan.effects] == [p.SetMemory]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(vcpus=9), "1 to 8 vCPUs"),
        (Change(vcpus=0), "1 to 8 vCPUs"),
        (Change(memory=2 << 40), "1 GiB"),
        (Change(cpu_quota=0), "quota"),
        (Change(cpu_weight=10001), "weight"),
        (Change(nics=(NicChange("eth9", inbound=8000),)), "no NIC eth9"),
        (Change(nics=(NicChange(inbound=10),)), "too low"),
        (Change(disks=(DiskChange("sdx", iops=5),)), "no disk sdx"),
        (Change(disks=(DiskChange(iops=0),)), "stops the disk"),
        (Change(disks=(DiskChange(iops=100, iops_burst=50),)), "burst"),
        (Change(disks=(DiskChange(iops_burst=50),)), "burst"),
        (Change(disks=(DiskChange(iops=5, burst_seconds=5),)), "burst"),
    ],
)
def test_what_a_vm_cannot_have_is_refused_with_a_hint(change: Change, said: str) -> None:
    vm = replace(vm_with(Allocation(1, 256 * MIB, disks=(DiskLimit("vda"), DiskLimit("vdb")))))
    refusal = goal_of(vm, change)
    assert isinstance(refusal, p.Refusal)
    assert said in refusal.message
    assert refusal.hint


def test_foreign_traffic_control_is_not_trampled() -> None:
    vm = vm_with(Allocation(1, 256 * MIB))
    vm = replace(vm, nics=(replace(vm.nics[0], foreign="htb 1: root"), vm.nics[1]))
    refused = goal_of(vm, Change(nics=(NicChange(inbound=10**6),)))
    assert isinstance(refused, p.Refusal)
    assert "htb 1: root" in refused.message
    assert isinstance(goal_of(vm, Change(nics=(NicChange(MACS[1], inbound=10**6),))), Allocation)


def test_every_step_has_a_name_of_its_own() -> None:
    kinds = p.Step.__args__  # type: ignore[attr-defined]
    assert len({k.__name__ for k in kinds}) == len(kinds)
    assert step_name(p.SetCpuQuota("u", 5)) == "set_cpu_quota"
    assert all(fields(k) for k in kinds)


@given(allocations, allocations, allocations)
def test_taking_back_touches_only_what_the_change_touched(old: Allocation, wanted: Allocation, now: Allocation) -> None:
    back = with_parts(now, old, wanted)
    for name in ("vcpus", "memory", "cpu_quota", "cpu_weight"):
        touched = getattr(old, name) != getattr(wanted, name)
        assert getattr(back, name) == getattr(old if touched else now, name)
    assert with_parts(wanted, old, wanted) == old
    assert with_parts(back, old, wanted) == back


def test_what_moves_by_itself_does_not_become_a_promise() -> None:
    record = Record(Allocation(1, 256 * MIB))
    vm = replace(vm_with(Allocation(1, 700 * MIB)), record=record)
    promised = promised_after(vm, Change(cpu_weight=50))
    assert isinstance(promised, Allocation)
    assert (promised.memory, promised.cpu_weight) == (256 * MIB, 50)
