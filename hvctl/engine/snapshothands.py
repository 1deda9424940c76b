"""What the steps of snapshots and resets do. The VM is the one that was observed when the operation began: its process
is held, so nothing has to be looked up again while the guest is paused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from hvctl.adapters.guest import agent as guest
from hvctl.engine.applied import AGENT_SECONDS, Applied, agent_call
from hvctl.engine.diskhands import disk_hand
from hvctl.engine.parthands import part_hand
from hvctl.errors import GuestError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model import plan as p
from hvctl.model.disksteps import ReadyDisk
from hvctl.model.snapshot import Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import State, Vm
from hvctl.ports import Host, Machine

T = TypeVar("T")
ADVISORY = (
    p.AwaitLife, p.AwaitAgent, p.SetClock, p.Reseed, p.RestoreBalloon, p.DropQueues, p.ForgetFlows, ReadyDisk,
)  # fmt: skip


def snapshot_hand(host: Host, step: p.Step, margin: int, seen: Vm | None) -> Applied:
    machine = host.machine

    def vm(uuid: str) -> Vm:
        return seen if seen is not None and seen.uuid == uuid else host.domains.get(uuid)

    match step:
        case p.Pause(uuid, toward):
            # Undone only where it did something: a guest that its operator paused stays paused.
            was_paused = vm(uuid).state is State.PAUSED
            load = (toward.snapshot, toward.nodes) if toward is not None else None
            machine.ready(vm(uuid), toward.snapshot if toward is not None else None)
            stopped = time.monotonic()
            machine.pause(vm(uuid), load)
            return Applied(None if was_paused else p.Resume(uuid), stopped=stopped)
        case p.Resume(uuid, greet, clock):
            return Applied(continued=machine.resume(vm(uuid), greet=greet, clock=clock))
        case p.AwaitLife(uuid, seconds):
            life = machine.await_life(vm(uuid), seconds)
            if life.seconds is None:
                return Applied()
            return Applied(facts={"life": life.seconds, "reseeded": life.reseeded, "clock": life.clock_set})
        case p.PrepareSnapshot(snapshot, arm):
            machine.prepare(vm(snapshot.vm_uuid), snapshot, arm)
            return Applied(p.DropSnapshot(snapshot))
        case p.ArmTracker(uuid, tracker):
            state = machine.arm(vm(uuid), tracker)
            return Applied(facts={"tracker": state.kind.value, "why": state.reason})
        case p.SaveState(snapshot):
            machine.save_state(vm(snapshot.vm_uuid), snapshot)
            return Applied()
        case p.CopyRam(snapshot, live):
            return Applied(facts={"bytes": machine.copy_ram(vm(snapshot.vm_uuid), snapshot, live=live)})
        case p.PatchRam(scratch, source, ranges):
            return Applied(facts={"bytes": machine.patch_ram(vm(scratch.vm_uuid), scratch, source, ranges or None)})
        case p.PublishSnapshot(snapshot):
            machine.publish(snapshot)
            return Applied()
        case p.DropSnapshot(snapshot):
            # Looked up: it may have ended in this very operation.
            found = _vm_or_none(host, snapshot.vm_uuid)
            machine.drop(found if found and found.state.active else None, snapshot)
            return Applied()
        case p.DropTags(uuid, tags):
            gone = machine.drop_tags(vm(uuid), tags)
            return Applied(facts={"tags": len(gone), "bytes": sum(t.bytes for t in gone)})
        case p.RestoreRam(snapshot, tries, tracker):
            done = machine.restore_ram(vm(snapshot.vm_uuid), snapshot, tracker, after_load=tries > 1)
            facts: dict[str, Any] = {
                "pages": done.pages,
                "bytes": done.bytes,
                "by": done.found_by.value,
                "next": done.tracker.value,
            }
            return Applied(facts=facts | ({"why": done.reason} if done.found_by is TrackerKind.COMPARE else {}))
        case p.LoadState(snapshot, nodes):
            machine.load_state(vm(snapshot.vm_uuid), snapshot, nodes)
            return Applied()
        case p.Audit(snapshot, state, nodes):
            return _audit(machine, vm(snapshot.vm_uuid), snapshot, state, nodes)
        case p.RestoreBalloon(snapshot):
            machine.restore_balloon(vm(snapshot.vm_uuid), snapshot)
            return Applied()
        case p.AwaitAgent(uuid, seconds):
            guest.wait(agent_call(host, uuid), seconds)
            return Applied()
        case p.SetClock(uuid):
            _with_agent(host, uuid, lambda call: guest.set_time(call, AGENT_SECONDS))
            return Applied()
        case p.Reseed(uuid):
            if not _with_agent(host, uuid, lambda call: guest.reseed(call, AGENT_SECONDS)):
                raise GuestError("the guest has no reseed hook: uniqueness is not guaranteed.")
            return Applied()
        case p.RunInGuest(uuid, argv, seconds, required):
            return _run(host, uuid, argv, seconds, required)
        case _:
            return disk_hand(host, step, vm) or part_hand(host, step, margin, vm)


def _audit(machine: Machine, vm: Vm, snapshot: Snapshot, state: Snapshot, nodes: tuple[str, ...] | None) -> Applied:
    """The tracker that missed pages is not used any more, and the reset is done again by comparing: virtio may have
    read its rings out of pages that were wrong."""
    missed = machine.audit(vm, snapshot)
    if not missed:
        return Applied(facts={"missed": 0})
    machine.restore_ram(vm, snapshot, TrackerKind.COMPARE)
    machine.load_state(vm, state, nodes)
    machine.restore_ram(vm, snapshot, TrackerKind.COMPARE, after_load=True)
    if machine.audit(vm, snapshot):
        raise HvctlError("guest RAM is not as in the snapshot, although all of it was compared and written.")
    return Applied(
        facts={"missed": missed},
        mended=f"an audit found {missed} pages that the tracker had missed: they were repaired, and the tracker is not"
        " used for this VM any more.",
    )


def _run(host: Host, uuid: str, argv: tuple[str, ...], seconds: float, required: bool) -> Applied:
    try:
        done = _with_agent(host, uuid, lambda call: guest.run(call, list(argv), seconds=seconds))
    except HvctlError as e:
        if required:
            raise
        return Applied(warning=f"the hook {argv[0]} could not be run: {e.message}")
    if done.status == 0:
        return Applied(facts={"status": 0})
    how = f"ended with status {done.status}" if done.status is not None else f"was killed by signal {done.signal}"
    text = done.stderr.decode(errors="replace").strip().splitlines()
    said = f": {text[-1][:200]}" if text else ""
    if required:
        raise RefusedError(f"{' '.join(argv)} {how} in the guest{said}.", f"hvctl vm exec VM -- {' '.join(argv)}")
    return Applied(warning=f"the hook {argv[0]} {how}{said}", facts={"status": done.status})


def _with_agent(host: Host, uuid: str, ask: Callable[[guest.Call], T]) -> T:
    """Ask the agent, a second time if its channel went away: libvirt drops it once more some time after a reset."""
    call = agent_call(host, uuid)
    try:
        return ask(call)
    except UnreachableError:
        guest.wait(call, AGENT_SECONDS)
        return ask(call)


def _vm_or_none(host: Host, uuid: str) -> Vm | None:
    try:
        return host.domains.get(uuid)
    except NotFoundError:
        return None
