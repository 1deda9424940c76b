"""What a guard does is done by the verbs that an operator has: allocate, reset, snapshot. Each under a key of its
decision, so that a death in between is seen by who comes next, and nothing is done twice."""

from __future__ import annotations

from dataclasses import replace

from hvctl.decide.growth import growth
from hvctl.decide.guardpolicy import scope_of
from hvctl.engine.operate import Engine
from hvctl.errors import BusyError, HvctlError, NotFoundError, RefusedError
from hvctl.model.guard import Act, Allowed, Alternative, Decided, GuardMemory, GuardPolicy
from hvctl.model.operation import OpState, Outcome
from hvctl.model.reset import Hooks, Wishes
from hvctl.model.vm import Vm
from hvctl.operations import snapshot as snapshots
from hvctl.operations.allocate import allocate


def refusal(engine: Engine, vm: Vm, policy: GuardPolicy, chosen: Alternative) -> str | None:
    """Why its verb would refuse it now, None if it would not."""
    try:
        if policy.snapshot_first and chosen.act.needs_snapshot:
            snapshots.take(engine, vm.uuid, "guard-0", dry_run=True)
        _do(engine, vm, policy, chosen, dry_run=True)
    except (RefusedError, NotFoundError) as e:
        return e.message
    return None


def carry_out(engine: Engine, vm: Vm, one: Decided) -> Decided:
    """Do what was decided, and write down what came of it. What failed is in the answer, too; an operation of which
    nobody knows how it ended is left to recovery, and looked at again by `settle`."""
    policy, chosen, host = one.watch.policy, one.decision.chosen, engine.facts.name
    assert chosen is not None
    try:
        if one.kept_until is not None:
            snapshots.take(engine, vm.uuid, one.kept, key=f"{_key(one)}-kept")
            engine.faults.point("guard", "kept", "after")
        outcome = _do(engine, vm, policy, chosen, key=_key(one))
        engine.faults.point("guard", "acted", "after")
        one = replace(one, operation=outcome.operation, outcome=str(outcome.state))
    except BusyError as e:
        # Nothing was begun: the next look may do it.
        state = engine.store.guards.state(host, vm.uuid)
        engine.store.guards.remember(host, vm.uuid, replace(state, memory=one.before))
        one = replace(one, outcome=f"not begun: {e.message}")
    except HvctlError as e:
        known = engine.store.operation_of_key(host, _key(one))
        if known is not None and known.state is OpState.OPEN:
            return one
        one = replace(one, operation=known.id if known else None, outcome=f"failed: {e.message}")
    engine.store.guards.change(host, one)
    return one


def settle(engine: Engine) -> int:
    """See what became of actions whose hvctl died; how many. Those whose operation is still open are left."""
    host, settled = engine.facts.name, 0
    for one in engine.store.guards.pending(host):
        known = engine.store.operation_of_key(host, _key(one))
        if known is not None and known.state is OpState.OPEN:
            continue
        found = "not begun: hvctl ended before" if known is None else f"{known.state}: {known.reason or 'as recovered'}"
        engine.store.guards.change(host, replace(one, operation=known.id if known else None, outcome=found))
        settled += 1
    return settled


def expire(engine: Engine) -> list[str]:
    """Delete the snapshots that were kept for an undo and whose time is over; why some could not be: they are tried
    again at the next look, and hold up nobody's."""
    faults = []
    for one in engine.store.guards.kept(engine.facts.name):
        if one.kept_until is None or one.kept_until > engine.clock():
            continue
        try:
            snapshots.delete(engine, one.vm_uuid, one.kept)
        except NotFoundError:
            pass
        except HvctlError as e:
            faults.append(f"{one.kept} of {one.vm_name} is still there: {e.message}")
            continue
        engine.store.guards.change(engine.facts.name, replace(one, kept_until=None))
    return faults


def undo(engine: Engine, ref: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Bring back what the last action reset, as it was right before; the guard then lets the VM alone for its
    cool-down. RefusedError if nothing is kept any more."""
    vm = engine.host.domains.get(ref)
    host, names = engine.facts.name, {s.name for s in engine.host.machine.snapshots(vm.uuid)}
    kept = [d for d in engine.store.guards.kept(host) if d.vm_uuid == vm.uuid and d.kept in names]
    one = next((d for d in kept if d.kept_until is not None and d.kept_until > engine.clock()), None)
    if one is None or one.decision.chosen is None:
        raise RefusedError(
            f"nothing that a guard reset of {vm.name} is kept.", "a policy with snapshot_first keeps it for a while"
        )
    chosen = one.decision.chosen
    outcome = snapshots.reset(
        engine, vm.uuid, one.kept, scope_of(chosen.part), _wishes(one.watch.policy, chosen), dry_run=dry_run, key=key
    )
    if not dry_run:
        state = engine.store.guards.state(host, vm.uuid)
        calm = GuardMemory({}, engine.clock(), f"undo of {chosen.part}")
        engine.store.guards.remember(host, vm.uuid, replace(state, memory=calm))
    return outcome


def _do(
    engine: Engine, vm: Vm, policy: GuardPolicy, chosen: Alternative, *, dry_run: bool = False, key: str | None = None
) -> Outcome:
    if chosen.act is Act.GROW:
        assert chosen.limit is not None
        change = growth(vm, chosen.resources[0], chosen.limit, engine.settings.memory_margin)
        return allocate(engine, vm.uuid, change, dry_run=dry_run, key=key)
    to = policy.to if chosen.act.needs_snapshot else None
    scope, wishes = scope_of(chosen.part), _wishes(policy, chosen)
    return snapshots.reset(engine, vm.uuid, to, scope, wishes, dry_run=dry_run, key=key)


def _wishes(policy: GuardPolicy, chosen: Alternative) -> Wishes:
    allowed = next((a for a in policy.allow if a.part == chosen.part), Allowed(chosen.part))
    return Wishes(hooks=Hooks(allowed.before, allowed.after))


def _key(one: Decided) -> str:
    return f"guard-{one.id}"
