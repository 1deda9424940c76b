"""doctor: probes of the host, then drift between what is promised and what is; --fix mends what has a mending.
prepare: the host's own changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import assert_never

from hvctl.decide.allocate import plan_allocation
from hvctl.decide.drift import Drift, Facts, Mend, drifts
from hvctl.engine.lock import free
from hvctl.engine.lostdisks import lost_disks
from hvctl.engine.observe import observe_all
from hvctl.engine.operate import Decision, Engine
from hvctl.engine.quarantine import quarantines, way_out
from hvctl.errors import HvctlError
from hvctl.model.allocation import Record
from hvctl.model.disksteps import PlugDisk
from hvctl.model.finding import Finding, degraded, ok
from hvctl.model.operation import Before, Kind, Phase
from hvctl.model.plan import ClearNics, DropSnapshot, DropTags, Enter, Plan, Refusal, SetRecord, Step
from hvctl.model.vm import State, Vm

GONE_SECONDS = 10.0


def look(engine: Engine) -> tuple[Drift, ...]:
    """What has come apart on this host now. Reads only."""
    host, name = engine.host, engine.facts.name
    promised = {p.vm_uuid: (p.vm_name, engine.store.record_of(name, p.vm_uuid)) for p in engine.store.promises(name)}
    folders, opened = host.storage.folders(), engine.store.open_operations(name)
    orphans = [o for o in opened if free(engine.settings.locks_dir, o.vm_uuid)]
    busy = {o.vm_uuid for o in opened}
    kept = {u: load for u in folders if u not in busy and (load := host.storage.kept_disks(u))}
    vms = observe_all(host, guest=True)
    left = {u: _left(engine, u) for u in folders if u not in busy | {vm.uuid for vm in vms}}
    # What is being made of another database's VM nobody here knows.
    own = [vm for vm in vms if vm.uuid in promised and vm.uuid not in busy]
    stray = {vm.uuid: tags for vm in own if (tags := host.machine.stray_tags(vm))}
    lost = {vm.uuid: tuple(b.plugs) for vm in own if vm.state.active and (b := lost_disks(engine, vm))}
    host.machine.release()
    return drifts(
        Facts(
            vms,
            promised,
            host.network.owners(),
            folders,
            left,
            tuple(host.machine.snapshots()),
            orphans,
            kept,
            stray,
            busy,
            {
                # One question to the journal, however many they are.
                vm.uuid: (f"operation {o.id}: {o.reason}", way_out(vm.name))
                for vm, o in quarantines(engine, vms)
            },
            lost,
        )
    )


def _left(engine: Engine, uuid: str) -> tuple[str, str]:
    """The name that a VM had, as far as the journal knows it, and its folder."""
    names = (o.vm_name for o in engine.store.operations(engine.facts.name, uuid))
    return next((n for n in names if n != uuid), uuid), str(engine.settings.vms_dir / uuid)


def as_findings(found: tuple[Drift, ...]) -> tuple[Finding, ...]:
    """Drifts in doctor's own form; one ok line if there are none."""
    if not found:
        return (ok("drift", "what was promised is in force"),)
    return tuple(
        degraded(
            f"drift:{d.vm_name}",
            d.detail,
            "what was promised does not hold",
            d.remedy,
            fixable=d.mend is not Mend.NOTHING,
        )
        for d in found
    )


def fix(engine: Engine, found: tuple[Drift, ...], say: Callable[[str], None]) -> None:
    """Mend what can be mended, each in an operation of its own; a mending that fails is said and hides no other.

    What belongs to a VM that is not listed goes only when it is absent from a second listing 10 s later."""
    absent = {d.vm_uuid for d in found if d.mend in (Mend.FORGET, Mend.CLEAR_DEVICES, Mend.DROP_SNAPSHOTS)}
    absent -= {vm.uuid for vm in engine.host.domains.list()}
    if absent:
        say(f"{len(absent)} VMs are not listed: looking again in {GONE_SECONDS:g} s before anything of theirs goes")
        time.sleep(GONE_SECONDS)
        absent -= {vm.uuid for vm in engine.host.domains.list()}
    for drift in found:
        try:
            _mend(engine, drift, drift.vm_uuid in absent)
        except HvctlError as e:
            say(f"{drift.vm_name}: not mended: {e.message}")


def _mend(engine: Engine, drift: Drift, gone: bool) -> None:
    uuid, name = drift.vm_uuid, drift.vm_name
    request = {"mend": drift.mend.value}
    match drift.mend:
        case Mend.NOTHING:
            return
        case Mend.RECOVER:
            engine.sweep()
        case Mend.REALLOCATE:
            engine.change(Kind.ALLOCATE, uuid, request, lambda vm: _reallocated(engine, vm))
        case Mend.RECORD:
            stored = engine.store.record_of(engine.facts.name, uuid)
            engine.change(Kind.ALLOCATE, uuid, request, lambda vm: _recorded(vm, stored))
        case Mend.FORGET if gone:
            steps: tuple[Step, ...] = (ClearNics(uuid),)
            decision = Decision(Plan(f"forget {name}", steps), Before(), forget=True)
            engine.change(Kind.DELETE, uuid, request, lambda _: decision, new=name)
        case Mend.CLEAR_DEVICES:
            engine.change(Kind.STOP, uuid, request, lambda vm: _cleared(uuid, name, vm), new="" if not gone else name)
        case Mend.DROP_SNAPSHOTS:
            engine.change(
                Kind.SNAPSHOT_DELETE,
                uuid,
                request,
                lambda vm: _dropped(engine, uuid, name, vm),
                new=name if gone else "",
            )
        case Mend.DROP_TAGS:
            engine.change(Kind.SNAPSHOT_DELETE, uuid, request, lambda vm: _untagged(engine, vm))
        case Mend.PLUG:
            engine.change(Kind.RESET, uuid, request, lambda vm: _plugged(engine, vm))
        case Mend.FORGET:
            return
        case _:
            assert_never(drift.mend)


def _reallocated(engine: Engine, vm: Vm | None) -> Decision | Refusal:
    if vm is None or vm.record is None:
        return Refusal("the VM is not there any more.")
    goal = vm.record.allocation
    balloon = engine.host.domains.balloon(vm.uuid) if vm.has_balloon and vm.state.active else None
    plan = plan_allocation(vm, goal, None, balloon, margin=engine.settings.memory_margin)
    if isinstance(plan, Refusal):
        return plan
    holds = vm.state.active
    return Decision(plan, Before(vm=vm, wanted=goal, goal=vm.record, holds=holds), goal=vm.record, holds=holds)


def _recorded(vm: Vm | None, stored: Record | None) -> Decision | Refusal:
    """The database says what was promised; what it does not know, the domain's metadata does."""
    record = stored or (vm.record if vm else None)
    if vm is None or record is None:
        return Refusal("the VM is not there any more.")
    plan = Plan(f"record of {vm.name}", (SetRecord(vm.uuid, record),))
    return Decision(plan, Before(vm=vm, goal=record, holds=vm.state.active), goal=record, holds=vm.state.active)


def _cleared(uuid: str, name: str, vm: Vm | None) -> Decision | Refusal:
    if vm is not None and vm.state is not State.OFF:
        return Refusal(f"{name} runs again.")
    return Decision(Plan(f"clear devices of {name}", (ClearNics(uuid),)), Before())


def _dropped(engine: Engine, uuid: str, name: str, vm: Vm | None) -> Decision | Refusal:
    process = vm.process if vm else None
    stale = [s for s in reversed(engine.host.machine.snapshots(uuid, hidden=True)) if s.binding.process != process]
    return Decision(Plan(f"drop stale snapshots of {name}", tuple(DropSnapshot(s) for s in stale)), Before(vm=vm))


def _plugged(engine: Engine, vm: Vm | None) -> Decision | Refusal:
    before = lost_disks(engine, vm) if vm is not None else None
    if vm is None or before is None or before.snapshot is None:
        return Refusal("the VM has all its disks.")
    snapshot = before.snapshot
    steps = tuple(PlugDisk(snapshot, target, xml) for target, xml in before.plugs.items())
    return Decision(Plan(f"plug {', '.join(before.plugs)} of {vm.name} again", steps), before)


def _untagged(engine: Engine, vm: Vm | None) -> Decision | Refusal:
    if vm is None:
        return Refusal("the VM is not there any more.")
    tags = tuple(t.tag for t in engine.host.machine.stray_tags(vm))
    steps = (Enter(Phase.TOUCHING), DropTags(vm.uuid, tags)) if tags else ()
    return Decision(Plan(f"drop tags of lost snapshots of {vm.name}", steps), Before(vm=vm))
