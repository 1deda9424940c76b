"""The steps that interrupt one VM, the steps that bring it back, and what becomes of either when its owner died: an
interruption is done again, since its room was promised to somebody; what came back is given what it was to have."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from hvctl.decide.allocate import plan_allocation, with_parts
from hvctl.decide.answer import Answer
from hvctl.model.allocation import Allocation, Record
from hvctl.model.awaysteps import ContinueGuest, EndGuest, Event, Notice, NotifyGuest, SaveGuest, SuspendGuest
from hvctl.model.operation import Before, OpState, Phase
from hvctl.model.plan import (
    ClearNics,
    Destroy,
    DropSnapshot,
    Enter,
    Plan,
    Refusal,
    SetMemory,
    SetNicLimit,
    SetRecord,
    Start,
    Step,
)
from hvctl.model.pool import Away, Rung
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Balloon, State, Vm
from hvctl.units import format_time


def notice_of(away: Away, event: Event) -> Notice:
    """Whoever works out the notice of an interruption again, after a crash too, gives it the same id."""
    identity = hashlib.sha256(f"{away.vm_uuid} {away.out_at!r}".encode()).hexdigest()[:32]
    return Notice(identity, event, away.rung, format_time(away.out_at), format_time(away.return_at), away.reason)


def _hears(vm: Vm) -> bool:
    """Whether there is a way to tell its guest; that somebody listens is seen when it is told."""
    return vm.has_agent or vm.pulse is not None


def plan_away(
    vm: Vm,
    away: Away,
    goal: Record,
    balloon: Balloon | None,
    snapshots: tuple[Snapshot, ...],
    *,
    grace: float,
    margin: int,
) -> Plan | Refusal:
    """goal is what it is promised while it is away: less on the first rung, else what it had."""
    steps: list[Step] = []
    if _hears(vm) and vm.state is State.RUNNING:
        steps.append(NotifyGuest(vm.uuid, notice_of(away, Event.INTERRUPTION), grace))
    if away.rung is Rung.SQUEEZE:
        plan = plan_allocation(vm, _squeezed(vm, goal), goal, balloon, margin=margin)
        if isinstance(plan, Refusal):
            return plan
        steps += plan.steps
    else:
        steps += [Enter(Phase.TOUCHING), *_going(vm.uuid, away.rung, grace), *_gone(vm.uuid, away.rung, snapshots)]
    reasons = [away.reason]
    if away.rung.ends_process and snapshots:
        reasons.append(f"drops {len(snapshots)} snapshots: they live in the QEMU process")
    return Plan(f"interrupt {vm.name} ({away.rung})", tuple(steps), tuple(reasons))


def _squeezed(vm: Vm, goal: Record) -> Allocation:
    """What is in force, with those parts that are to be promised anew."""
    return with_parts(vm.allocation, goal.allocation, vm.record.allocation if vm.record else vm.allocation)


def _going(uuid: str, rung: Rung, grace: float) -> tuple[Step, ...]:
    match rung:
        case Rung.PAUSE:
            return (SuspendGuest(uuid),)
        case Rung.SAVE:
            return (SaveGuest(uuid),)
        case Rung.SHUTDOWN:
            return (EndGuest(uuid, grace),)
        case _:
            return (Destroy(uuid),)


def _gone(uuid: str, rung: Rung, snapshots: tuple[Snapshot, ...]) -> tuple[Step, ...]:
    """What belonged to the QEMU process goes with it."""
    return (ClearNics(uuid), *(DropSnapshot(s) for s in snapshots)) if rung.ends_process else ()


def plan_return(vm: Vm, away: Away, snapshots: tuple[Snapshot, ...]) -> Plan | Refusal:
    """With what was worked out for it at once. Of a VM that is off the definition is changed before it starts; what
    libvirt does not keep, and what a saved guest wakes up without, comes right after."""
    steps: list[Step] = [Enter(Phase.TOUCHING)]
    awake = replace(vm, state=State.RUNNING)
    if not vm.state.active:
        config = plan_allocation(vm, away.goal.allocation, None, None, margin=0)
        if isinstance(config, Refusal):
            return config
        steps += [*(DropSnapshot(s) for s in snapshots), *config.effects, Start(vm.uuid)]
        # A saved guest goes on with what it had when it was saved, whatever the definition says since.
        was = away.left if away.rung is Rung.SAVE else away.goal.allocation
        awake = replace(
            awake, allocation=replace(was, nics=tuple(replace(n, inbound=None, outbound=None) for n in was.nics))
        )
    elif vm.state is State.PAUSED:
        if away.rung is not Rung.PAUSE:
            return Refusal(f"{vm.name} is {vm.state} ({vm.reason}).", f"virsh resume {vm.name}")
        steps.append(ContinueGuest(vm.uuid))
    given = _given(awake, away)
    if isinstance(given, Refusal):
        return given
    if vm.record != away.goal:
        given = (*given, SetRecord(vm.uuid, away.goal))
    if _hears(vm):
        given = (*given, NotifyGuest(vm.uuid, notice_of(away, Event.RETURNED)))
    return Plan(f"resume {vm.name}", (*steps, *given), (f"{away.rung} since {format_time(away.out_at)}", away.forecast))


def _given(awake: Vm, away: Away) -> tuple[Step, ...] | Refusal:
    """From what the guest wakes up with to what it is to have. Memory as far as it comes: it runs already."""
    plan = plan_allocation(awake, away.goal.allocation, None, None, margin=0, force=True)
    if isinstance(plan, Refusal):
        return plan
    return tuple(replace(s, best_effort=True) if isinstance(s, SetMemory) else s for s in plan.effects)


# --- recovery


def interrupt_answer(
    uuid: str, phase: Phase, before: Before, now: Vm | None, snapshots: tuple[Snapshot, ...]
) -> Answer:
    away = before.away
    if away is None or now is None:
        return Answer(OpState.FAILED, (ClearNics(uuid),), "the VM is gone")
    if away.rung is Rung.SQUEEZE:
        return _squeeze_answer(before, away, now, phase)
    gone = _gone(uuid, away.rung, snapshots)
    if not now.state.active:
        return Answer(OpState.DONE, gone, "the VM is off", goal_holds=True)
    if now.protected or now.record is None or not now.record.interruptible:
        return Answer(OpState.UNDONE, _withdrawn(now, away), "it may not be interrupted any more")
    if away.rung is Rung.PAUSE and now.state is State.PAUSED:
        return Answer(OpState.DONE, (), "the VM is paused", goal_holds=True)
    told = phase is not Phase.BEGUN or not _hears(now) or now.state is not State.RUNNING
    notice = () if told else (NotifyGuest(uuid, notice_of(away, Event.INTERRUPTION), before.grace),)
    steps = (*notice, Enter(Phase.TOUCHING), *_going(uuid, away.rung, before.grace), *gone)
    return Answer(OpState.DONE, steps, "the interruption was done again", goal_holds=True)


def _withdrawn(now: Vm, away: Away) -> tuple[Step, ...]:
    return (NotifyGuest(now.uuid, notice_of(away, Event.WITHDRAWN)),) if _hears(now) else ()


def _squeeze_answer(before: Before, away: Away, now: Vm, phase: Phase) -> Answer:
    """All squeezed, or as before: nobody was given anything yet."""
    if phase is Phase.BEGUN or before.vm is None or before.goal is None:
        return Answer(OpState.UNDONE, _withdrawn(now, away), "nothing was taken")
    wanted = _squeezed(before.vm, before.goal)
    if now.record == before.goal and with_parts(now.allocation, wanted, before.vm.allocation) == now.allocation:
        return Answer(OpState.DONE, (), "all of it was in place", goal_holds=True)
    back = with_parts(now.allocation, before.vm.allocation, wanted)
    plan = plan_allocation(now, back, before.vm.record, None, margin=0, force=True)
    if isinstance(plan, Refusal):
        return Answer(OpState.FAILED, reason=plan.message)
    steps = tuple(replace(s, best_effort=True) if isinstance(s, SetMemory) else s for s in plan.effects)
    return Answer(OpState.UNDONE, (*steps, *_withdrawn(now, away)), "everything is as before")


def resume_answer(before: Before, now: Vm | None) -> Answer:
    """Whether it came back is seen. One that did is given what it was to have; the others are still away."""
    away = before.away
    if away is None or now is None:
        return Answer(OpState.FAILED, reason="the VM is gone")
    if not now.state.active:
        return Answer(OpState.UNDONE, reason="it did not come back yet")
    steps: tuple[Step, ...] = ()
    if now.state is State.PAUSED and away.rung is Rung.PAUSE:
        steps = (ContinueGuest(now.uuid),)
    given = _given(replace(now, state=State.RUNNING), away)
    if isinstance(given, Refusal):
        return Answer(OpState.FAILED, steps, given.message)
    taps = {n.mac for n in now.nics if n.tap}
    given = tuple(s for s in given if not isinstance(s, SetNicLimit) or s.limit.mac in taps)
    steps = (*steps, *given, SetRecord(now.uuid, away.goal))
    return Answer(OpState.DONE, steps, "it came back, and has what it was to have", goal_holds=True)
