"""snapshot and reset: keep a state of a running VM, and bring the VM back to it inside the same QEMU process."""

from __future__ import annotations

import re
import uuid as uuids
from datetime import UTC, datetime

from hvctl import codec
from hvctl.decide.reset import after_reset, plan_drop, plan_reset, plan_take, refuse_unready
from hvctl.engine.operate import Decision, Engine
from hvctl.errors import NotFoundError, UsageError
from hvctl.model.operation import Before, Kind, Outcome
from hvctl.model.plan import Refusal
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def take(
    engine: Engine, ref: str, name: str | None = None, *, dry_run: bool = False, key: str | None = None
) -> Outcome:
    """Take a snapshot of RAM, devices and all writable disks; the name defaults to the time."""
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
        snapshot = _new_snapshot(engine, vm, chosen, moment)
        need, free = machine.room(vm)
        plan = plan_take(vm, snapshot, need, free, tuple(machine.snapshots(vm.uuid)))
        if isinstance(plan, Refusal):
            return plan
        before = Before(vm=vm, snapshot=snapshot, was_running=vm.state is State.RUNNING)
        return Decision(plan, before, result={"snapshot": chosen, "id": snapshot.id})

    if dry_run:
        return engine.preview(Kind.SNAPSHOT_TAKE, ref, ref, decide)
    return engine.change(Kind.SNAPSHOT_TAKE, ref, {"name": name}, decide, key=key)


def _new_snapshot(engine: Engine, vm: Vm, name: str, moment: datetime) -> Snapshot:
    identity = str(uuids.uuid4())
    folder = engine.settings.snapshots_dir / vm.uuid / identity
    return Snapshot(
        id=identity,
        name=name,
        vm_uuid=vm.uuid,
        created_at=moment.isoformat().replace("+00:00", "Z"),
        binding=engine.host.machine.binding(vm),
        tag=f"hvctl-{identity}",
        nodes=engine.host.machine.nodes(vm),
        vmstate_node=f"hvctl-{identity[:8]}",
        folder=str(folder),
        ram_path=vm.ram_path or "",
        ram_size=vm.max_memory,
        balloon=_balloon(vm),
        vcpus=vm.allocation.vcpus,
        stored=0,
    )


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


def reset(engine: Engine, ref: str, name: str, *, dry_run: bool = False, key: str | None = None) -> Outcome:
    """Return the whole VM to a snapshot; the result says which process it still is, and what could not be assured."""

    def decide(vm: Vm | None) -> Decision | Refusal:
        if vm is None:
            return Refusal(f"there is no VM {ref}.")
        snapshot = find(engine, vm, name)
        if vm.protected:
            return Refusal(
                f"{vm.name} is protected: a reset throws its work away.", f"hvctl vm protect {vm.name} --off"
            )
        refused = refuse_unready(vm) if vm.reason != "io-error" else None
        if refused:
            return refused
        plan = plan_reset(vm, snapshot, engine.host.machine.binding(vm))
        if isinstance(plan, Refusal):
            return plan
        resumed = not (vm.state is State.PAUSED and vm.reason == "user")
        goal = after_reset(vm, snapshot)
        return Decision(
            plan,
            Before(vm=vm, goal=goal, snapshot=snapshot, was_running=resumed, holds=True),
            goal=goal,
            holds=True,
            result={"snapshot": name, "warmth": "warm", "process": codec.dump(snapshot.binding.process)},
        )

    if dry_run:
        return engine.preview(Kind.RESET, ref, ref, decide)
    return engine.change(Kind.RESET, ref, {"to": name}, decide, key=key)
