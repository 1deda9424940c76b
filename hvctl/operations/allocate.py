"""allocate: change what a VM may use, as one plan that is applied whole or undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvctl import codec
from hvctl.decide.allocate import goal_of, plan_allocation, promised_after
from hvctl.engine.operate import Decision, Engine
from hvctl.model.allocation import KEEP, Change, Record
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal, SetMemory
from hvctl.model.vm import State, Vm


def allocate(
    engine: Engine,
    ref: str,
    change: Change,
    *,
    force: bool = False,
    best_effort: bool = False,
    dry_run: bool = False,
    key: str | None = None,
) -> Outcome:
    """Give the VM what `change` names; force shrinks memory without statistics, best_effort keeps a partial result."""

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        goal = goal_of(vm, change)
        if isinstance(goal, Refusal):
            return goal
        shrinks = goal.memory < vm.allocation.memory and vm.state is not State.OFF
        balloon = engine.host.domains.balloon(vm.uuid) if shrinks and vm.has_balloon else None
        promised = promised_after(vm, change)
        if isinstance(promised, Refusal):
            return promised
        record = (vm.record or Record(vm.allocation)).with_allocation(promised)
        plan = plan_allocation(
            vm,
            goal,
            record,
            balloon,
            margin=engine.settings.memory_margin,
            force=force,
            best_effort=best_effort,
        )
        if isinstance(plan, Refusal):
            return plan
        # Best effort may have raised the memory target to what the guest can give: that is what is promised.
        memory = next((s.target for s in plan.steps if isinstance(s, SetMemory)), vm.allocation.memory)
        if memory != goal.memory:
            goal, record = replace(goal, memory=memory), record.with_memory(memory)
        return Decision(
            plan,
            Before(vm=vm, wanted=goal, goal=record, holds=vm.state.active),
            goal=record,
            holds=vm.state.active,
            result={"before": codec.dump(vm.allocation), "after": codec.dump(goal)},
        )

    if dry_run:
        return engine.preview(Kind.ALLOCATE, ref, ref, decide)
    return engine.change(Kind.ALLOCATE, ref, {"change": _asked(change)}, decide, key=key)


def _asked(change: Change) -> dict[str, Any]:
    return {k: v for k, v in codec.dump(change).items() if v not in (KEEP.value, [])}
