"""snapshot and reset: keep a state of a running VM, and bring the VM back to it inside the same QEMU process."""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from statistics import median
from typing import Any

from hvctl import codec
from hvctl.decide.reclaim import reclaim_refusal
from hvctl.decide.replug import refuse_replug
from hvctl.decide.reset import (
    after_reset,
    around,
    needs_scratch,
    parent_of,
    part_names,
    plan_drop,
    plan_reset,
    plan_take,
    refuse_unready,
)
from hvctl.decide.scope import disk_targets, each_disk
from hvctl.engine.diskuse import disks_in_use, system_disks
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import NotFoundError, UsageError
from hvctl.model.operation import Before, Kind, OpState, Outcome
from hvctl.model.plan import Plan, Refusal
from hvctl.model.reset import AS_USUAL, WHOLE, Scope, Wishes
from hvctl.model.snapshot import Binding, Range, Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import State, Vm
from hvctl.units import moment

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def take(
    engine: Engine,
    ref: str,
    name: str | None = None,
    *,
    owned: Sequence[Range] = (),
    tracker: TrackerKind = TrackerKind.AUTO,
    dry_run: bool = False,
    key: str | None = None,
) -> Outcome:
    """Take a snapshot of RAM, devices and all writable disks; the name defaults to the time. owned are guest-physical
    ranges that an application in the guest declares its own."""
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name for a snapshot.", "use letters, digits and . _ -, at most 63")
    moment = datetime.now(UTC)
    chosen = name or moment.strftime("s%Y%m%d-%H%M%S")

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        refused = refuse_unready(vm)
        if refused:
            return refused
        machine = engine.host.machine
        taken, tracking = tuple(machine.snapshots(vm.uuid)), machine.tracking(vm)
        binding = machine.binding(vm)
        parent = parent_of(tracking, taken, binding)
        snapshot = _new_snapshot(engine, vm, chosen, moment, binding, parent)
        in_use = disks_in_use(engine.host, vm)
        mounted = None if in_use is None else tuple(sorted(in_use))
        snapshot = replace(snapshot, owned=tuple(owned), mounted=mounted, agent=vm.has_agent and vm.agent_connected)
        need, free = machine.room(vm)
        plan = plan_take(vm, snapshot, need, free, taken, tracking, tracker)
        if isinstance(plan, Refusal):
            return plan
        before = Before(vm=vm, snapshot=snapshot, was_running=vm.state is State.RUNNING)
        return Decision(plan, before, result={"snapshot": chosen, "id": snapshot.id, "parent": parent})

    if dry_run:
        return engine.preview(Kind.SNAPSHOT_TAKE, ref, ref, decide)
    return engine.change(Kind.SNAPSHOT_TAKE, ref, {"name": name}, decide, key=key)


def _new_snapshot(
    engine: Engine, vm: Vm, name: str, moment: datetime, binding: Binding, parent: str | None
) -> Snapshot:
    identity = str(uuids.uuid4())
    folder = engine.settings.snapshots_dir / vm.uuid / identity
    return Snapshot(
        id=identity,
        name=name,
        vm_uuid=vm.uuid,
        created_at=moment.isoformat().replace("+00:00", "Z"),
        binding=binding,
        tag=f"hvctl-{identity}",
        targets=engine.host.machine.nodes(vm),
        vmstate_node=f"hvctl-{identity[:8]}",
        folder=str(folder),
        regions=vm.ram,
        balloon=_balloon(vm),
        vcpus=vm.allocation.vcpus,
        stored=0,
        parent=parent,
    )


def _scratch(engine: Engine, vm: Vm, binding: Binding) -> Snapshot:
    """The state as it is now, for as long as a partial reset needs it: hidden, and without disks."""
    machine = engine.host.machine
    parent = parent_of(machine.tracking(vm), tuple(machine.snapshots(vm.uuid)), binding)
    snapshot = _new_snapshot(engine, vm, "scratch", datetime.now(UTC), binding, parent)
    return replace(snapshot, targets={}, hidden=True)


def _balloon(vm: Vm) -> int:
    """The size that the balloon has, or still moves to: right after a start it is on its way down to the promise."""
    promised = vm.record.allocation.memory if vm.record else vm.allocation.memory
    return min(promised, vm.allocation.memory) if vm.has_balloon else vm.allocation.memory


def find(engine: Engine, vm: Vm, name: str) -> Snapshot:
    """A snapshot by name or id; NotFoundError."""
    taken = engine.host.machine.snapshots(vm.uuid)
    for snapshot in taken:
        if name in (snapshot.name, snapshot.id):
            return snapshot
    have = ", ".join(s.name for s in taken) or "none"
    raise NotFoundError(f"{vm.name} has no snapshot {name}.", f"its snapshots: {have}")


def delete(engine: Engine, ref: str, name: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        snapshot = find(engine, vm, name)
        return Decision(plan_drop(vm.name, snapshot), Before(vm=vm, snapshot=snapshot), result={"snapshot": name})

    if dry_run:
        return engine.preview(Kind.SNAPSHOT_DELETE, ref, ref, decide)
    return engine.change(Kind.SNAPSHOT_DELETE, ref, {"name": name}, decide, key=key)


def reset(
    engine: Engine,
    ref: str,
    name: str | None,
    scope: Scope = WHOLE,
    wishes: Wishes = AS_USUAL,
    *,
    dry_run: bool = False,
    key: str | None = None,
) -> Outcome:
    """Return a VM, or parts of it, to a snapshot; the result says which process it still is, how coherent it is, how
    long each step took, and what could not be assured."""
    if name is None and scope.needs_snapshot:
        raise UsageError("a reset needs a snapshot to return to.", "--to NAME; `hvctl snapshot list VM` shows them")

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        snapshot = find(engine, vm, name) if name is not None else None
        if vm.protected:
            return Refusal(
                f"{vm.name} is protected: a reset throws its work away.", f"hvctl vm protect {vm.name} --off"
            )
        if scope.cache and (refusal := reclaim_refusal(vm)):
            return refusal
        if snapshot is None or not scope.needs_snapshot:
            plan = Plan(f"reset {' and '.join(part_names(scope))} of {vm.name}", around(vm, scope))
            return Decision(plan, Before(vm=vm, scope=scope), result={"scope": part_names(scope)})
        refused = refuse_unready(vm) if vm.reason != "io-error" else None
        return refused or _decide_reset(engine, vm, snapshot, scope, wishes)

    request = {"to": name, "scope": codec.dump(scope), "wishes": codec.dump(wishes)}
    if dry_run:
        outcome = engine.preview(Kind.RESET, ref, ref, decide)
        return replace(outcome, result=outcome.result | {"expected": expected(engine, outcome.vm_uuid, request)})
    return engine.change(Kind.RESET, ref, request, decide, key=key)


def _decide_reset(engine: Engine, vm: Vm, snapshot: Snapshot, scope: Scope, wishes: Wishes) -> Decision | Refusal:
    machine, scope = engine.host.machine, each_disk(vm, scope)
    binding, tracking = machine.binding(vm), machine.tracking(vm)
    every = engine.settings.audit_every
    if wishes.audit is None:
        due = every > 0 and tracking is not None and tracking.resets % every == every - 1
        wishes = replace(wishes, audit=due)
    scratch = _scratch(engine, vm, binding) if needs_scratch(scope) else None
    in_use = disks_in_use(engine.host, vm) if scope.disks else None
    if wishes.replug and (refusal := refuse_replug(vm, scope, system_disks(engine.host, vm))):
        return refusal
    plugs = {t: engine.host.domains.disk_xml(vm.uuid, t) for t in disk_targets(vm, scope)} if wishes.replug else {}
    answer = plan_reset(vm, snapshot, binding, scope, wishes, in_use, scratch, tracking, plugs)
    if isinstance(answer, Refusal):
        return answer
    plan, coherence = answer
    resumed = not (vm.state is State.PAUSED and vm.reason == "user")
    whole = scope.ram and scope.devices
    goal = after_reset(vm, snapshot) if whole else None
    before = Before(
        vm=vm,
        goal=goal,
        snapshot=snapshot,
        was_running=resumed,
        holds=whole,
        scope=scope,
        wishes=wishes,
        scratch=scratch,
        plugs=plugs,
    )
    return Decision(
        plan,
        before,
        goal=goal,
        holds=whole,
        result={
            "snapshot": snapshot.name,
            "warmth": "warm",
            "coherence": coherence.value,
            "scope": part_names(scope),
            "process": codec.dump(snapshot.binding.process),
        },
    )


def expected(engine: Engine, uuid: str, request: dict[str, Any]) -> dict[str, Any]:
    """What earlier resets of the same parts to the same snapshot took: medians, and of how many; empty without any.
    paused and bytes are None of parts that go back while the guest runs; took is all of the operation, in seconds."""
    earlier = engine.store.operations(engine.facts.name, uuid, OpState.DONE, limit=100)
    like = [o for o in earlier if o.kind is Kind.RESET and all(o.request.get(k) == request[k] for k in ("to", "scope"))]
    like = [o for o in like if bool(o.before.get("plugs")) == request["wishes"]["replug"]]
    paused = [o.result["paused"] for o in like if o.result and "paused" in o.result]
    written = [o.result["bytes"] for o in like if o.result and "bytes" in o.result]
    took = [moment(o.closed_at) - moment(o.opened_at) for o in like if o.closed_at]
    if not took:
        return {}
    return {
        "resets": len(took),
        "paused": median(paused) if paused else None,
        "bytes": int(median(written)) if written else None,
        "took": median(took),
    }
