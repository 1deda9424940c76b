"""resume: VMs that were interrupted come back, with what was worked out for them, and neighbours their own again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvctl.decide.away import plan_return
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.allocation import Record
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Away, Rung
from hvctl.model.vm import Vm
from hvctl.operations import restarts
from hvctl.operations.demand import Progress, finish, restore_neighbours


@dataclass(frozen=True, slots=True)
class Returned:
    """Who came back, and who did not, with why."""

    outcomes: tuple[Outcome, ...]
    left: tuple[tuple[Away, str], ...] = ()
    warnings: tuple[str, ...] = ()


def away(engine: Engine) -> tuple[Away, ...]:
    return engine.store.pool.away(engine.facts.name)


def resume(engine: Engine, refs: Sequence[str], *, dry_run: bool = False, key: str | None = None) -> Returned:
    """These VMs, each or an error."""
    found, keys = away(engine), {ref: f"{key}-{ref}" for ref in refs} if key else {}
    chosen = {ref: one for ref in refs if (one := next((a for a in found if ref in (a.vm_name, a.vm_uuid)), None))}
    known = {ref: answer for ref in refs if (answer := _answered(engine, ref, keys.get(ref)))}
    if left := [ref for ref in refs if ref not in chosen | known]:
        raise NotFoundError(f"{left[0]} is not away.", "hvctl resume without a VM lists those that are")
    outcomes = [known.get(ref) or _one(engine, chosen[ref], dry_run, keys.get(ref)) for ref in refs]
    done = Progress()
    if not dry_run:
        restore_neighbours(engine, done)
    return Returned((*outcomes, *done.outcomes), warnings=tuple(done.warnings))


def due(engine: Engine, *, dry_run: bool = False) -> Returned:
    """Everybody whose time has come, the longest away first. Who does not fit yet stays away, and says why."""
    outcomes, left = [], []
    if not dry_run:
        finish(engine, Progress())
    for one in away(engine):
        if one.return_at > engine.clock():
            continue
        try:
            outcomes.append(_one(engine, one, dry_run, None))
        except NotFoundError:
            engine.store.pool.end_away(engine.facts.name, one.vm_uuid, engine.clock())
            left.append((one, "the VM is not there any more"))
        except HvctlError as e:
            left.append((one, e.message))
    done = Progress()
    if not dry_run:
        restore_neighbours(engine, done)
    return Returned((*outcomes, *done.outcomes), tuple(left), tuple(done.warnings))


def _answered(engine: Engine, ref: str, key: str | None) -> Outcome | None:
    """What a return that was asked for with this key was answered; which one it was its row says."""
    known = engine.store.operation_of_key(engine.facts.name, key) if key else None
    return None if known is None else engine.answered(Kind.RESUME, ref, known.request, key)


def _goal(vm: Vm, one: Away) -> Record:
    """What was worked out, unless somebody promised it something else since; all else of its record is as it is now.
    A guest that kept its RAM wakes up with no less memory than it had."""
    record = vm.record or one.goal
    if record.allocation == one.left:
        return record.with_allocation(one.goal.allocation)
    if one.rung is Rung.SAVE:
        return record.with_memory(max(record.allocation.memory, one.left.memory))
    return record


def _one(engine: Engine, one: Away, dry_run: bool, key: str | None) -> Outcome:
    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {one.vm_name}.", "hvctl vm list")
        if not vm.state.active and not one.rung.ends_process:
            return Refusal(f"{vm.name} was stopped while it was away.", f"hvctl vm start {vm.name}")
        back = replace(one, goal=_goal(vm, one))
        snapshots = tuple(reversed(engine.host.machine.snapshots(vm.uuid, hidden=True)))
        plan = plan_return(vm, back, () if vm.state.active else snapshots)
        if isinstance(plan, Refusal):
            return plan
        before = Before(vm=vm, goal=back.goal, holds=True, away=back)
        earlier = restarts.last_return(restarts.returns(engine, vm.uuid))
        if earlier:
            plan = replace(
                plan, reasons=(*plan.reasons, f"after its last return it needed {restarts.in_words(earlier)}")
            )
        result = {"rung": one.rung.value, "away": one.id, "last_return": earlier}
        return Decision(plan, before, goal=back.goal, holds=True, result=result)

    if dry_run:
        return engine.preview(Kind.RESUME, one.vm_uuid, one.vm_name, decide)
    try:
        return engine.change(Kind.RESUME, one.vm_uuid, {"rung": one.rung.value, "away": one.id}, decide, key=key)
    except RefusedError:
        vm = engine.host.domains.get(one.vm_uuid)
        if not vm.state.active and not one.rung.ends_process:
            # Somebody stopped it: it is theirs to start.
            engine.store.pool.end_away(engine.facts.name, one.vm_uuid, engine.clock())
        raise
