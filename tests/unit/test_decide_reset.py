"""The order of the steps of taking and of going back, which is what makes them safe, for every request there can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from hvctl.decide.reset import parent_of, plan_reset, plan_take
from hvctl.decide.scope import each_disk
from hvctl.model import plan as p
from hvctl.model.disksteps import PrepareDisk, RestoreDisk
from hvctl.model.operation import Phase
from hvctl.model.reset import AS_USUAL, WHOLE, Scope, Wishes
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.stepwords import step_name
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import Process, State, Vm
from unit.test_scope import BINDING, IN_USE, SCOPES, SCRATCH, SNAPSHOT, VM, WISHES

# What changes the guest for good: RAM, devices, disks.
WRITES = (p.RestoreRam, p.LoadState, p.Audit, RestoreDisk)
TRACKINGS = st.none() | st.builds(
    Tracking, st.just(BINDING.process), st.just(VM.ram), st.sampled_from([k for k in TrackerKind if k != "auto"])
)
STATES = st.sampled_from(((State.RUNNING, "booted"), (State.PAUSED, "user"), (State.PAUSED, "save")))


@st.composite
def vms(draw: st.DrawFn) -> Vm:
    state, reason = draw(STATES)
    nics = tuple(replace(n, tap=n.tap if draw(st.booleans()) else None) for n in VM.nics)
    pulse = "/p" if draw(st.booleans()) else None
    return replace(VM, state=state, reason=reason, nics=nics, has_agent=draw(st.booleans()), pulse=pulse)


def steps_of(
    vm: Vm, scope: Scope, wishes: Wishes, in_use: Any = frozenset(), tracking: Tracking | None = None,
    snapshot: Snapshot = SNAPSHOT,
) -> tuple[p.Step, ...]:  # fmt: skip
    answer = plan_reset(vm, snapshot, BINDING, each_disk(vm, scope), wishes, in_use, SCRATCH, tracking)
    if isinstance(answer, p.Refusal):
        reject()
    return answer[0].steps


def sound(scope: Scope) -> Scope:
    """Without the disks that cannot go back together with the rest of it."""
    if scope.ram and scope.devices:
        disks = None if scope.disks is None else tuple(replace(d, range=None) for d in scope.disks)
        return replace(scope, disks=disks, ranges=())
    return replace(scope, disks=() if scope.ram or scope.devices or scope.ranges else scope.disks)


def place(steps: tuple[p.Step, ...], *kinds: Any) -> list[int]:
    return [n for n, s in enumerate(steps) if isinstance(s, kinds)]


def enters(steps: tuple[p.Step, ...]) -> list[Phase]:
    return [s.phase for s in steps if isinstance(s, p.Enter)]


Asked = tuple[Vm, Scope, Wishes, Any, Tracking | None]
# Most are such as are not refused: what is refused has no order.
ACCEPTED = WISHES | WISHES.map(lambda wishes: replace(wishes, accept_incoherent=True))
resets = given(st.tuples(vms(), SCOPES.map(lambda scope: sound(scope)), ACCEPTED, IN_USE, TRACKINGS))


@resets
def test_nothing_that_cannot_be_taken_back_comes_before_it_is_said(asked: Asked) -> None:
    steps = steps_of(*asked)
    if not place(steps, *WRITES):
        assert enters(steps) == [], "then it may be undone at any point"
        return
    assert enters(steps) == [Phase.TOUCHING, Phase.COMMITTED]
    touching, committed = place(steps, p.Enter)
    assert all(touching < n < committed for n in place(steps, *WRITES))
    assert all(isinstance(s, WRITES) for s in steps[touching + 1 : committed]), "and nothing else is in between"


@resets
def test_ram_is_right_before_and_after_every_load(asked: Asked) -> None:
    steps = steps_of(*asked)
    loads = place(steps, p.LoadState)
    assert len(place(steps, p.RestoreRam)) == 2 * len(loads)
    for n in loads:
        before, after = steps[n - 1], steps[n + 1]
        assert isinstance(before, p.RestoreRam)
        assert isinstance(after, p.RestoreRam)
        assert before.snapshot == after.snapshot
        assert (before.tries, after.tries) == (1, 2)


@resets
def test_the_guest_is_paused_while_it_is_written_and_runs_only_when_it_is_whole(asked: Asked) -> None:
    vm, wishes = asked[0], asked[2]
    steps = steps_of(*asked)
    if not place(steps, p.LoadState):
        assert not place(steps, p.Pause, p.Resume)
        return
    (pause,) = place(steps, p.Pause)
    assert pause < min(place(steps, *WRITES))
    committed = place(steps, p.Enter)[-1]
    if vm.state is State.PAUSED and vm.reason == "user":
        assert not place(steps, p.Resume), "its operator paused it"
        assert not place(steps, p.AwaitLife, p.AwaitAgent, p.RunInGuest), "nobody is there to answer"
    else:
        (resume,) = place(steps, p.Resume)
        assert committed < resume
        assert all(resume < n for n in place(steps, p.AwaitLife, p.AwaitAgent, p.SetClock, p.Reseed, p.RestoreBalloon))
    if place(steps, p.Audit):
        assert place(steps, p.Audit) == [committed - 1]
    assert bool(place(steps, p.Audit)) == bool(wishes.audit)


@resets
def test_packets_of_another_time_are_gone_before_the_guest_runs(asked: Asked) -> None:
    vm, scope = asked[:2]
    steps = steps_of(*asked)
    if scope.ram and scope.devices and any(n.tap for n in vm.nics) and place(steps, p.Resume):
        assert place(steps, p.DropQueues)[0] < place(steps, p.Resume)[0]


@resets
def test_what_goes_back_is_what_was_asked(asked: Asked) -> None:
    vm, scope = asked[:2]
    steps = steps_of(*asked)
    each = each_disk(vm, scope)
    for load in (s for s in steps if isinstance(s, p.LoadState)):
        ram = next(s for s in steps if isinstance(s, p.RestoreRam)).snapshot
        if scope.ram and scope.devices:
            assert (ram, load.snapshot) == (SNAPSHOT, SNAPSHOT)
            if scope.disks is None and not scope.keep:
                assert load.nodes is None
            else:
                back = {"vda", "vdb"} - {{"results": "vdb"}.get(k, k) for k in scope.keep}
                if scope.disks is not None:
                    back = {{"root": "vda", "results": "vdb"}.get(d.disk, d.disk) for d in scope.disks}
                assert set(load.nodes or ()) == {f"node-{t}" for t in back}
        else:
            assert ram == SCRATCH
            assert load.snapshot == (SNAPSHOT if scope.devices else SCRATCH)
            assert load.nodes == (), "no disk goes back with a part of RAM"
    patches = [s for s in steps if isinstance(s, p.PatchRam)]
    if place(steps, p.LoadState) and not (scope.ram and scope.devices) and (scope.ram or scope.ranges):
        assert [(s.scratch, s.source, s.ranges) for s in patches] == [(SCRATCH, SNAPSHOT, scope.ranges)]
    else:
        assert not patches
    disks = [(s.target, s.range) for s in steps if isinstance(s, RestoreDisk)]
    if scope.ram and scope.devices:
        assert disks == []
    else:
        names = {"root": "vda", "results": "vdb"}
        assert disks == [(names.get(d.disk, d.disk), d.range) for d in each.disks or ()]
        assert disks == [(s.target, s.range) for s in steps if isinstance(s, PrepareDisk)]


@resets
def test_a_scratch_snapshot_is_whole_before_it_is_needed_and_goes_again(asked: Asked) -> None:
    steps = steps_of(*asked)
    prepared = place(steps, p.PrepareSnapshot)
    if not prepared:
        assert SCRATCH not in [getattr(s, "snapshot", None) for s in steps]
        assert not place(steps, p.DropSnapshot)
        return
    order = [step_name(s) for s in steps if getattr(s, "snapshot", getattr(s, "scratch", None)) == SCRATCH]
    published = order.index("publish_snapshot")
    assert order[:published] == [
        "prepare_snapshot",
        "save_state",
        "copy_ram",
        *(["patch_ram"] * order.count("patch_ram")),
    ]
    assert steps.index(p.PublishSnapshot(SCRATCH)) < place(steps, p.Enter)[0]
    assert order[-1] == "drop_snapshot"
    assert place(steps, p.DropSnapshot)[0] > place(steps, p.Enter)[-1]
    assert place(steps, p.Resume) < place(steps, p.DropSnapshot), "the guest does not wait for that"


@resets
def test_a_tracker_that_is_asked_for_is_tried_before_anything_is_written(asked: Asked) -> None:
    wishes, tracking = asked[2], asked[4]
    steps = steps_of(*asked)
    named = wishes.tracker in (TrackerKind.UFFD, TrackerKind.SOFT_DIRTY)
    needed = named and (tracking is None or tracking.kind is not wishes.tracker)
    if place(steps, p.LoadState) and needed:
        (arm,) = place(steps, p.ArmTracker)
        assert place(steps, p.Pause)[0] < arm < place(steps, p.Enter)[0]
    else:
        assert not place(steps, p.ArmTracker)
    assert {s.tracker for s in steps if isinstance(s, p.RestoreRam)} <= {wishes.tracker}


@resets
def test_the_network_and_the_cache_come_last_and_only_when_asked(asked: Asked) -> None:
    vm, scope = asked[:2]
    steps = steps_of(*asked)
    assert bool(place(steps, p.DropCaches)) == scope.cache
    assert bool(place(steps, p.ForgetFlows)) == scope.net
    if scope.net:
        rebuilt = [s for s in steps if isinstance(s, p.SetNicLimit)]
        assert [s.limit.mac for s in rebuilt] == [n.mac for n in vm.nics if n.tap]
        assert all(s.rebuild for s in rebuilt)
    if scope.cache:
        assert steps[-1] == p.DropCaches(vm.uuid)


# --- a guest in the present


@pytest.mark.parametrize("pulse", [None, "/p"])
@pytest.mark.parametrize("agent", [False, True])
@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("reseed", [False, True])
def test_who_sets_the_clock_and_reseeds(pulse: str | None, agent: bool, clock: bool, reseed: bool) -> None:
    """With its first instructions if it has a port for that, else through its agent, which takes longer."""
    vm = replace(VM, pulse=pulse, has_agent=agent)
    steps = steps_of(vm, WHOLE, replace(AS_USUAL, audit=False, clock=clock, reseed=reseed))
    (resume,) = [s for s in steps if isinstance(s, p.Resume)]
    assert (resume.greet, resume.clock) == (reseed, clock)
    greeted = pulse is not None and reseed
    assert bool(place(steps, p.AwaitLife)) == greeted
    assert bool(place(steps, p.SetClock)) == (agent and clock and not greeted)
    assert bool(place(steps, p.Reseed)) == (agent and reseed and not greeted)
    if place(steps, p.SetClock, p.Reseed) and pulse is None:
        assert place(steps, p.AwaitAgent)[0] < min(place(steps, p.SetClock, p.Reseed))


def test_a_reset_that_nobody_makes_present_says_so() -> None:
    vm = replace(VM, pulse=None, has_agent=False)
    wishes = replace(AS_USUAL, audit=False)
    found = [plan_reset(v, SNAPSHOT, BINDING, WHOLE, w) for v, w in (
        (vm, wishes), (replace(vm, has_agent=True), wishes), (replace(vm, pulse="/p"), wishes),
        (vm, replace(wishes, clock=False, reseed=False)),
    )]  # fmt: skip
    said = [any("random generator" in r for r in f[0].reasons) for f in found if not isinstance(f, p.Refusal)]
    assert said == [True, False, False, False]


# --- what fits


def test_what_does_not_fit_is_refused_with_the_difference() -> None:
    for other, why in (
        (replace(BINDING, process=Process(9, 9, "boot")), "another one"),
        (replace(BINDING, devices=("cpu0", "usb0")), "'usb0' is new"),
        (replace(BINDING, devices=()), "'cpu0' is gone"),
        (replace(BINDING, blocks=BINDING.blocks[:1]), "is gone"),
    ):
        found = plan_reset(VM, SNAPSHOT, other, WHOLE, replace(AS_USUAL, audit=False))
        assert isinstance(found, p.Refusal)
        assert why in found.message


@pytest.mark.parametrize("name", ["vdc", "image", "vdz", ""])
def test_disks_that_cannot_go_back_or_stay_are_refused(name: str) -> None:
    from hvctl.model.reset import DiskPart

    for scope in (Scope(keep=(name,)), Scope(False, False, (DiskPart(name),)), Scope(True, True, (DiskPart(name),))):
        assert isinstance(
            plan_reset(VM, SNAPSHOT, BINDING, scope, replace(AS_USUAL, accept_incoherent=True)), p.Refusal
        )


# --- taking


@given(vms(), TRACKINGS, st.booleans(), st.sampled_from(TrackerKind))
def test_a_take_stores_ram_beside_the_guest_and_pauses_it_shortly(
    vm: Vm, tracking: Tracking | None, known: bool, tracker: TrackerKind
) -> None:
    tracking = replace(tracking, base="1") if tracking and known else tracking
    plan = plan_take(vm, replace(SNAPSHOT, name="new"), 1, 2, (SNAPSHOT,), tracking, tracker)
    assert isinstance(plan, p.Plan)
    steps = plan.steps
    assert enters(steps) == [Phase.TOUCHING, Phase.COMMITTED]
    running = vm.state is State.RUNNING
    state = True
    for step in steps:
        match step:
            case p.Pause():
                assert state is running
                state = False
            case p.Resume():
                state = True
            case p.ArmTracker() | p.SaveState() | p.PublishSnapshot():
                assert not (running and state), "only under the pause"
            case p.CopyRam(_, live):
                assert live == (running and state)
    assert state or not running, "it runs again"
    armed = tracking is None or tracking.base is None
    assert len(place(steps, p.ArmTracker)) == armed
    assert len(place(steps, p.Pause)) == len(place(steps, p.Resume)) == running * (1 + armed)
    save = place(steps, p.SaveState)[0]
    assert [step_name(s) for s in steps[save : save + 3]] == ["save_state", "copy_ram", "publish_snapshot"]
    assert isinstance(steps[save + 3], p.Enter), "the manifest is what makes it one"


def test_a_take_is_refused_for_want_of_a_name_or_of_room() -> None:
    assert isinstance(plan_take(VM, SNAPSHOT, 1, 2, (SNAPSHOT,), None), p.Refusal)
    full = plan_take(VM, replace(SNAPSHOT, name="t"), 3 << 20, 2 << 20, (SNAPSHOT,), None)
    assert isinstance(full, p.Refusal)
    assert "3 MiB" in full.message
    assert "2 MiB" in full.message
    over = plan_take(VM, replace(SNAPSHOT, name="t"), 3 << 20, -5, (SNAPSHOT,), None)
    assert isinstance(over, p.Refusal)
    assert "-" not in over.message.partition("needs")[2], "nobody has less than nothing free"


def test_whose_difference_the_next_snapshot_is() -> None:
    first, second = SNAPSHOT, replace(SNAPSHOT, id="9")
    other = replace(SNAPSHOT, id="8", binding=replace(BINDING, process=Process(1, 1, "boot")))

    def chosen(base: str | None, *taken: Snapshot, now: Binding = BINDING) -> str | None:
        return parent_of(Tracking(now.process, (), base=base) if base else None, taken, now)

    assert chosen(None) is None
    assert chosen(None, first, second) == "9"
    assert chosen("1", first, second) == "1", "what RAM is of now"
    assert chosen("gone", first, second) == "9"
    assert chosen("8", first, other) == "1", "not of another process"
    assert chosen(None, other) is None
