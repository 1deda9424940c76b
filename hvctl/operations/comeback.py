"""resume: VMs that were interrupted come back, with what was worked out for them, and neighbours their own again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvctl.decide.away import plan_return
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.pool import Away
from hvctl.model.vm import Vm
from hvctl.operations.demand import Progress, restore_neighbours


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
    found = away(engine)
    chosen = []
    for ref in refs:
        one = next((a for a in found if ref in (a.vm_name, a.vm_uuid)), None)
        if one is None:
            raise NotFoundError(f"{ref} is not away.", "hvctl resume without a VM lists those that are")
        chosen.append(one)
    outcomes = [_one(engine, one, dry_run, f"{key}-{i}" if key else None) for i, one in enumerate(chosen)]
    done = Progress()
    if not dry_run:
        restore_neighbours(engine, done)
    return Returned((*outcomes, *done.outcomes), warnings=tuple(done.warnings))


def due(engine: Engine, *, dry_run: bool = False) -> Returned:
    """Everybody whose time has come, the longest away first. Who does not fit yet stays away, and says why."""
    outcomes, left = [], []
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


def _one(engine: Engine, one: Away, dry_run: bool, key: str | None) -> Outcome:
    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {one.vm_name}.", "hvctl vm list")
        if not vm.state.active and not one.rung.ends_process:
            return Refusal(f"{vm.name} was stopped while it was away.", f"hvctl vm start {vm.name}")
        snapshots = tuple(reversed(engine.host.machine.snapshots(vm.uuid, hidden=True)))
        plan = plan_return(vm, one, () if vm.state.active else snapshots)
        if isinstance(plan, Refusal):
            return plan
        before = Before(vm=vm, goal=one.goal, holds=True, away=one)
        return Decision(plan, before, goal=one.goal, holds=True, result={"rung": one.rung.value, "away": one.id})

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
