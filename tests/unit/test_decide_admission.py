"""Admission: never over capacity, unknown is not gone, what shrinks is never refused."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hvctl.decide.admission import admit, capacity_of, holders
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.host import Capacity, HostFacts, Ledger, Promise
from hvctl.model.vm import State
from hvctl.settings import Settings
from unit.vms import MIB, vm_with

FACTS = HostFacts("h", "qemu:///system", 2, 8 << 30, "7.2", "9.0", "b", 1, 0, 0)
vectors = st.builds(Resources, cpu=st.integers(0, 400), memory=st.integers(0, 8), network=st.just(0), iops=st.just(0))


def test_capacity_is_overcommit_minus_reserve() -> None:
    settings = Settings(cpu_overcommit=4.0, reserve_cpus=1, memory_overcommit=1.5, reserve_memory=1 << 30)
    assert capacity_of(FACTS, settings) == Capacity(cpu=700, memory=11 << 30)


@given(st.lists(vectors, max_size=12))
def test_what_is_granted_one_after_another_never_passes_capacity(asked: list[Resources]) -> None:
    capacity = Capacity(cpu=500, memory=10)
    held: dict[str, tuple[str, Resources]] = {}
    for i, want in enumerate(asked):
        refusal = admit(capacity, held, f"vm{i}", want)
        after = {**held, f"vm{i}": (f"vm{i}", want)}
        fits = all(
            sum(getattr(r, n) for _, r in after.values()) <= getattr(capacity, n) or getattr(want, n) == 0
            for n in ("cpu", "memory")
        )
        assert (refusal is None) == fits
        if refusal is None:
            held = after
    assert sum(r.cpu for _, r in held.values()) <= 500
    assert sum(r.memory for _, r in held.values()) <= 10


def test_a_refusal_names_resource_amount_and_holders() -> None:
    held = {"b": ("big", Resources(memory=700 * MIB)), "c": ("small", Resources(memory=100 * MIB))}
    refusal = admit(Capacity(cpu=100, memory=1000 * MIB), held, "a", Resources(memory=300 * MIB))
    assert refusal
    assert "memory lacks 100 MiB" in refusal.message
    assert "big 700 MiB, small 100 MiB" in (refusal.hint or "")


def test_an_overfull_host_may_always_be_relieved() -> None:
    held = {"a": ("a", Resources(cpu=300, memory=9)), "b": ("b", Resources(cpu=300, memory=9))}
    capacity = Capacity(cpu=400, memory=10)
    assert admit(capacity, held, "a", Resources(cpu=200, memory=9)) is None
    assert admit(capacity, held, "a", Resources(cpu=301, memory=1)) is not None


def test_unknown_is_not_gone_and_off_is() -> None:
    allocation = Allocation(1, 256 * MIB)
    running = vm_with(allocation)
    promise = Promise(running.uuid, "a", resources(allocation), holds=True)
    assert holders(Ledger((promise,)), ()) == {running.uuid: ("a", promise.resources)}
    assert holders(Ledger((promise,)), (replace(running, state=State.OFF),)) == {}
    busy = replace(promise, busy=True)
    assert holders(Ledger((busy,)), (replace(running, state=State.OFF),)) != {}
    assert holders(Ledger(()), (running,)) == {running.uuid: ("a", resources(allocation))}
    paused = replace(running, state=State.PAUSED)
    assert holders(Ledger((replace(promise, holds=False),)), (paused,)) == {running.uuid: ("a", promise.resources)}


def test_a_quota_below_the_vcpus_is_what_counts() -> None:
    assert resources(Allocation(4, 1, cpu_quota=150)).cpu == 150
    assert resources(Allocation(1, 1, cpu_quota=400)).cpu == 100
