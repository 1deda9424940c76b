"""guard: look at VMs before they run out of something, and do the one thing that helps most for its cost. What it may
do is its policy; what it decided, nothing included, is in the journal."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvctl.decide import life
from hvctl.decide.guard import decide_doable
from hvctl.decide.guardpolicy import problem
from hvctl.engine.guardfacts import VmLook
from hvctl.engine.guardhost import HostLook, look_at_host
from hvctl.engine.observe import observe, observe_all
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import HvctlError, UsageError
from hvctl.model.guard import Decided, GuardState, Watch
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.vm import Vm
from hvctl.operations.guardact import carry_out, expire, refusal, settle


@dataclass(frozen=True, slots=True)
class Guarded:
    """An armed VM, and the last decision about it (None: nobody has looked yet)."""

    vm: Vm
    watch: Watch
    last: Decided | None


def arm(engine: Engine, ref: str, watch: Watch | None, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Have a VM guarded by a policy from the next cycle on; None: no more."""

    def decided(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        stored = engine.store.record_of(engine.facts.name, vm.uuid)
        plan, record = life.plan_guard(vm, watch, stored.guard if stored else None)
        return Decision(plan, Before(vm=vm, goal=record, holds=vm.state.active), goal=record, holds=vm.state.active)

    if dry_run:
        return engine.preview(Kind.SET, ref, ref, decided)
    outcome = engine.change(Kind.SET, ref, {"guard": watch and watch.name}, decided, key=key)
    if watch is None:
        engine.store.guards.remember(engine.facts.name, outcome.vm_uuid, None)
    return outcome


def preview(engine: Engine, ref: str, watch: Watch) -> Decided:
    """What it would decide now by that policy; nothing is written."""
    vm = observe(engine.host, ref)
    return _considered(engine, look_at_host(engine, [(vm, watch)]), vm, watch)[0]


def guarded(engine: Engine) -> list[Guarded]:
    last = engine.store.guards.newest(engine.facts.name)
    return [Guarded(vm, watch, last.get(vm.uuid)) for vm, watch in _armed(engine)]


def cycle(engine: Engine) -> str:
    """One look at each VM that is guarded, and at most one action on each; in words. HvctlError names those that could
    not be looked at, after all others were."""
    settle(engine)
    done, faults = [], expire(engine)
    armed = _armed(engine)
    if not (armed or faults):
        return "nobody is guarded"
    host: HostLook | None = look_at_host(engine, armed)
    for vm, watch in armed:
        try:
            host = host or look_at_host(engine, armed)
            one = look(engine, host, vm, watch)
        except HvctlError as e:
            faults.append(f"{vm.name}: {e.message}")
            continue
        if one.decision.chosen is not None:
            host = None  # the next decision sees what this one has changed
            done.append(f"{vm.name}: {one.decision.chosen.name} ({one.outcome or 'not known yet'}, decision d{one.id})")
    if faults:
        raise HvctlError("; ".join([*faults, *done]), "hvctl guard status")
    return f"{len(armed)} guarded; " + ("; ".join(done) or "nothing was done")


def look(engine: Engine, host: HostLook, vm: Vm, watch: Watch) -> Decided:
    """Decide about one VM, write that down, and do it."""
    one, state = _considered(engine, host, vm, watch)
    chosen, policy = one.decision.chosen, watch.policy
    if chosen is not None and policy.snapshot_first and chosen.act.needs_snapshot:
        one = replace(one, kept_until=one.at + policy.keep)
    one = engine.store.guards.decided(engine.facts.name, one, state)
    if chosen is None:
        return one
    engine.faults.point("guard", "decided", "after")
    return carry_out(engine, vm, one)


def _considered(engine: Engine, host: HostLook, vm: Vm, watch: Watch) -> tuple[Decided, GuardState]:
    """The decision, and what the guard remembers after it. What its verb would refuse is no choice."""
    if wrong := problem(watch.policy):
        raise UsageError(
            f"the guard policy {watch.name} in the record of {vm.name} does not work: {wrong}.",
            f"hvctl guard {vm.name} --policy NAME",
        )
    state = engine.store.guards.state(engine.facts.name, vm.uuid)
    seen = VmLook(engine, host, vm, watch.policy, state)
    facts, decision = decide_doable(
        seen.facts(), watch.policy, state.memory, lambda chosen: refusal(engine, vm, watch.policy, chosen)
    )
    most = decision.contention
    one = Decided(vm.uuid, vm.name, facts.at, facts.at, watch, facts, state.memory, decision, 1, most, facts.at)
    return one, GuardState(decision.memory, seen.looks)


def _armed(engine: Engine) -> list[tuple[Vm, Watch]]:
    """What runs and is guarded. What the domain's metadata lost of that, the database still knows."""
    records = engine.store.records(engine.facts.name)
    found = []
    for vm in observe_all(engine.host):
        stored = records.get(vm.uuid)
        watch = (vm.record.guard if vm.record else None) or (stored.guard if stored else None)
        if watch and vm.state.active:
            found.append((vm, watch))
    return found
