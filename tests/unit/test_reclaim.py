"""How far a guest is squeezed for its page cache, and that its memory is given back whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.adapters.guest import agent
from hvctl.decide.allocate import MIN_MEMORY, memory_floor
from hvctl.decide.reclaim import reclaim_refusal, squeeze_target
from hvctl.engine import reclaim as engine
from hvctl.errors import DeadlineError, GuestError, HvctlError, RefusedError, UnreachableError
from hvctl.model.allocation import Allocation
from hvctl.model.plan import Refusal
from hvctl.model.vm import Balloon, State
from hvctl.ports import Host
from unit.vms import MIB, vm_with

MEMORY, MARGIN = 256 * MIB, 32 * MIB
DROP = "/bin/sh -c sync && echo 3 > /proc/sys/vm/drop_caches"
sizes = st.integers(0, 4 << 30)


@given(
    actual=sizes, usable=sizes, memory=st.integers(16, 4096).map(lambda m: m * MIB), margin=st.integers(0, 256 * MIB)
)
def test_a_target_leaves_what_is_used_and_the_margin_and_never_passes_the_allocation(
    actual: int, usable: int, memory: int, margin: int
) -> None:
    balloon = Balloon(actual, usable=usable, age=0.0)
    target = squeeze_target("a", balloon, memory, margin)
    floor = memory_floor(balloon, margin)
    assert isinstance(target, int)
    assert floor is not None
    assert MIN_MEMORY <= target <= memory
    assert target >= min(memory, floor)
    assert target % MIB == 0
    assert target == memory or target < max(floor, MIN_MEMORY) + MIB


@pytest.mark.parametrize("balloon", [Balloon(MEMORY), Balloon(MEMORY, usable=MEMORY, age=60.0)])
def test_a_guest_that_does_not_report_is_not_squeezed(balloon: Balloon) -> None:
    assert isinstance(squeeze_target("a", balloon, MEMORY, MARGIN), Refusal)


def test_what_is_refused_before_anything_is_touched() -> None:
    fit = vm_with(Allocation(1, MEMORY))
    assert reclaim_refusal(fit) is None
    for unfit, word in (
        (replace(fit, state=State.PAUSED), "paused"),
        (replace(fit, state=State.OFF), "off"),
        (replace(fit, has_agent=False), "agent"),
        (replace(fit, has_balloon=False), "balloon"),
    ):
        refusal = reclaim_refusal(unfit)
        assert refusal is not None
        assert word in refusal.message
        assert refusal.hint


# --- the guest is asked to drop


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ({"exited": True, "exitcode": 1}, "status 1"),
        ({"exited": True, "signal": 9}, "signal 9"),
        ({"exited": True}, "not how"),
    ],
)
def test_a_drop_that_did_not_succeed_is_an_error(ended: dict[str, object], said: str) -> None:
    with pytest.raises(GuestError, match=said):
        agent.drop_caches(lambda command, _arguments, _seconds: ended if command.endswith("status") else {"pid": 1})


# --- in order, on the fake host


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path / "state.json")


@pytest.fixture
def host(world: FakeWorld) -> Host:
    return open_fake(world.uri)


@pytest.fixture
def vm(world: FakeWorld) -> str:
    return world.add_vm("a", memory=MEMORY, behaviour={"used_memory": 64 * MIB})


@pytest.fixture
def targets(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the balloon was asked for."""
    asked: list[int] = []
    move: Callable[[str, int], int] = host.domains.set_balloon

    def noted(uuid: str, target: int) -> int:
        asked.append(target)
        return move(uuid, target)

    monkeypatch.setattr(host.domains, "set_balloon", noted)
    return asked


def reclaimed(host: Host, uuid: str) -> engine.Reclaimed:
    return engine.reclaim(host, host.domains.get(uuid), MARGIN)


def test_dropped_squeezed_and_given_back(world: FakeWorld, host: Host, vm: str, targets: list[int]) -> None:
    done = reclaimed(host, vm)
    assert targets == [96 * MIB, MEMORY]
    assert (done.target, done.reached, done.won) == (96 * MIB, 96 * MIB, None)
    assert world.vm(vm).executed == [DROP]
    assert world.vm(vm).allocation.memory == MEMORY


def test_nothing_to_take_leaves_the_balloon_alone(world: FakeWorld, host: Host, vm: str, targets: list[int]) -> None:
    world.set_behaviour(vm, used_memory=MEMORY)
    assert reclaimed(host, vm).reached == MEMORY
    assert targets == []


def test_a_squeeze_that_stops_early_is_given_back_and_told(
    world: FakeWorld, host: Host, vm: str, targets: list[int]
) -> None:
    world.set_behaviour(vm, balloon_floor=128 * MIB)
    done = reclaimed(host, vm)
    assert (done.target, done.reached) == (96 * MIB, 128 * MIB)
    assert world.vm(vm).allocation.memory == MEMORY


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", ["DeadlineError", "HvctlError", "UnreachableError"])
def test_whatever_becomes_of_the_squeeze_the_memory_is_given_back(
    world: FakeWorld, host: Host, vm: str, targets: list[int], error: str, after: bool
) -> None:
    world.fail("set_balloon", error, after=after)
    with pytest.raises(HvctlError):
        reclaimed(host, vm)
    assert targets == [96 * MIB, MEMORY]
    assert world.vm(vm).allocation.memory == MEMORY


def test_memory_that_the_guest_does_not_take_back_is_an_error(
    world: FakeWorld, host: Host, vm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.domains, "set_balloon", lambda _uuid, _target: 96 * MIB)
    with pytest.raises(GuestError, match=r"96 MiB and does not take the rest of its 256 MiB back") as caught:
        reclaimed(host, vm)
    assert "hvctl allocate a --memory" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ({"agent": "absent"}, UnreachableError),
        ({"agent": "silent"}, DeadlineError),
        ({"agent": "hostile"}, GuestError),
        ({"refuses": ["guest-exec"]}, GuestError),
    ],
)
def test_a_guest_that_does_not_drop_is_not_squeezed(
    world: FakeWorld, host: Host, vm: str, targets: list[int], behaviour: dict[str, object], error: type[HvctlError]
) -> None:
    world.set_behaviour(vm, **behaviour)
    with pytest.raises(error):
        reclaimed(host, vm)
    assert targets == []


def test_a_guest_without_reports_is_not_squeezed(
    world: FakeWorld, host: Host, vm: str, targets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_REPORT_SECONDS", 0.0)
    world.set_behaviour(vm, balloon_stats=False)
    with pytest.raises(GuestError, match="did not report"):
        reclaimed(host, vm)
    assert targets == []


def test_an_older_report_is_not_taken_for_a_new_one(
    host: Host, vm: str, targets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_REPORT_SECONDS", 0.0)
    old = Balloon(MEMORY, usable=MEMORY, age=0.5)
    monkeypatch.setattr(host.domains, "balloon", lambda _uuid: old)
    with pytest.raises(GuestError, match="did not report"):
        reclaimed(host, vm)
    assert targets == []


def test_a_vm_that_is_off_is_refused(world: FakeWorld, host: Host) -> None:
    off = world.add_vm("b", running=False)
    with pytest.raises(RefusedError, match="off"):
        reclaimed(host, off)
