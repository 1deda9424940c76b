"""apply(step): one step of a plan made real. Each looks first, acts only on a difference, lets the port verify,
and gives back its inverse, so that undoing belongs to the effect and not to the plan."""

from __future__ import annotations

import contextlib
import time
from typing import assert_never

from hvctl.adapters.guest import agent as guest
from hvctl.decide.allocate import memory_floor
from hvctl.engine.applied import AGENT_SECONDS, Applied, agent_call
from hvctl.engine.archivehands import archive_hand
from hvctl.engine.awayhands import away_hand
from hvctl.engine.observe import observe
from hvctl.engine.snapshothands import snapshot_hand
from hvctl.errors import BusyError, DeadlineError, GuestError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model import plan as p
from hvctl.model.allocation import NicLimit
from hvctl.model.vm import State, Vm
from hvctl.ports import Host
from hvctl.units import format_size

ONLINE_SECONDS = 10.0
POLL_SECONDS = 0.1


def apply(host: Host, step: p.Step, margin: int, seen: Vm | None = None) -> Applied:
    """Make one step real on a host. margin: bytes that a guest keeps above what it uses. seen: the VM as the operation
    observed it, for steps that go on with its process."""
    match step:
        case p.Enter():
            return Applied()
        case p.MakeDisks(spec):
            host.storage.make_disks(spec)
            return Applied(p.RemoveFiles(spec.uuid))
        case p.MakeMonitorFolder(uuid):
            new = uuid not in host.storage.folders()
            host.storage.make_monitor_folder(uuid)
            return Applied(p.RemoveFiles(uuid) if new else None)
        case p.RemoveFiles(uuid):
            host.storage.remove(uuid)
            return Applied()
        case p.Define(spec):
            host.domains.define(spec)
            return Applied(p.Undefine(spec.uuid))
        case p.Undefine(uuid):
            host.domains.undefine(uuid)
            return Applied()
        case p.Redefine(uuid, xml):
            before = host.domains.xml(uuid)
            host.domains.redefine(uuid, xml)
            return Applied(p.Redefine(uuid, before))
        case p.Start(uuid, paused):
            if (vm := host.domains.get(uuid)).state.active:
                if not paused:
                    return Applied()
                # Nobody can say what that one ran with: recovery looks.
                raise BusyError(f"somebody else started {vm.name} meanwhile.", f"hvctl vm show {vm.name}")
            host.domains.start(uuid, paused=paused)
            return Applied(p.Destroy(uuid))
        case p.Shutdown(uuid, seconds):
            return _shutdown(host, uuid, seconds)
        case p.Destroy(uuid):
            host.domains.destroy(uuid)
            return Applied()
        case p.SetVcpus() | p.SetCpuQuota() | p.SetCpuWeight() | p.SetMemory() | p.SetDiskLimit() | p.SetNicLimit():
            return _allocate(host, step, margin)
        case p.ClearNics(uuid):
            host.network.clear(uuid)
            return Applied()
        case p.SetRecord(uuid, record):
            old = host.domains.get(uuid).record
            host.domains.set_record(uuid, record)
            return Applied(p.SetRecord(uuid, old))
        case _:
            return archive_hand(host, step, seen) or away_hand(host, step) or snapshot_hand(host, step, margin, seen)


def _shutdown(host: Host, uuid: str, seconds: float) -> Applied:
    """Ask again while waiting: a guest that is still booting does not hear the first request."""
    deadline = time.monotonic() + seconds
    while True:
        host.domains.shutdown(uuid)
        left = deadline - time.monotonic()
        state = host.domains.wait_state(uuid, frozenset({State.OFF, State.CRASHED}), max(0.1, min(5.0, left)))
        if state is State.OFF:
            return Applied()
        if time.monotonic() >= deadline:
            raise GuestError(f"the guest did not power off in {seconds:g} s.", "hvctl vm stop --force ends its process")


def _allocate(
    host: Host,
    step: p.SetVcpus | p.SetCpuQuota | p.SetCpuWeight | p.SetMemory | p.SetDiskLimit | p.SetNicLimit,
    margin: int,
) -> Applied:
    vm = observe(host, step.uuid, guest=isinstance(step, p.SetVcpus))
    now = vm.allocation
    match step:
        case p.SetVcpus(uuid, count):
            return _set_vcpus(host, vm, count)
        case p.SetCpuQuota(uuid, percent):
            host.domains.set_cpu_quota(uuid, percent)
            return Applied(p.SetCpuQuota(uuid, now.cpu_quota))
        case p.SetCpuWeight(uuid, weight):
            host.domains.set_cpu_weight(uuid, weight)
            return Applied(p.SetCpuWeight(uuid, now.cpu_weight))
        case p.SetMemory():
            return _set_memory(host, vm, step, margin)
        case p.SetDiskLimit(uuid, limit):
            host.domains.set_disk_limit(uuid, limit)
            return Applied(p.SetDiskLimit(uuid, now.disk(limit.target)))
        case p.SetNicLimit(uuid, limit):
            host.network.set_limit(_tap(vm, limit), limit, uuid)
            return Applied(p.SetNicLimit(uuid, now.nic(limit.mac)))
        case _:
            assert_never(step)


def _tap(vm: Vm, limit: NicLimit) -> str:
    tap = next((n.tap for n in vm.nics if n.mac == limit.mac), None)
    if tap is None:
        raise NotFoundError(f"{vm.name} has no tap for NIC {limit.mac} now.", f"hvctl vm show {vm.name}")
    return tap


def _set_vcpus(host: Host, vm: Vm, count: int) -> Applied:
    """Offline in the guest before the unplug, online after the plug. A guest without an agent is left to itself: its
    kernel may give a vCPU back on the unplug alone, and may bring a new one online by itself."""
    before = vm.allocation.vcpus
    inverse = p.SetVcpus(vm.uuid, before)
    if vm.state is not State.RUNNING:
        host.domains.set_vcpus(vm.uuid, count)
        return Applied(inverse)
    call = agent_call(host, vm.uuid)
    plugged = host.domains.get(vm.uuid).allocation.vcpus
    try:
        if count < before:
            return _shrink_vcpus(host, vm.uuid, call, count, inverse)
        # More may be plugged than are online: then nothing has to come, and what is left over goes if it can.
        host.domains.set_vcpus(vm.uuid, max(plugged, count))
        online = _online_in_time(call, count)
        if plugged > count:
            _unplug_again(host, vm.uuid, count)
        return Applied(inverse, facts={"guest": online})
    except (DeadlineError, UnreachableError):
        raise
    except HvctlError:
        # Some of the vCPUs may have gone along before one did not.
        with contextlib.suppress(HvctlError):
            _online(call, before)
        if count > before:
            _unplug_again(host, vm.uuid, plugged)
        raise


def _shrink_vcpus(host: Host, uuid: str, call: guest.Call, count: int, inverse: p.Step) -> Applied:
    online = _online(call, count)
    try:
        host.domains.set_vcpus(uuid, count)
    except GuestError as e:
        if online is None:
            raise
        kept = f"offline in the guest, but still plugged ({e.message}): only a CPU quota keeps it from coming back"
        return Applied(inverse, kept, {"guest": online, "unplugged": False})
    return Applied(inverse, facts={"guest": online, "unplugged": True})


def _unplug_again(host: Host, uuid: str, plugged: int) -> None:
    """Back to `plugged` vCPUs: a QEMU that cannot unplug the others leaves them plugged and unused."""
    with contextlib.suppress(GuestError):
        host.domains.set_vcpus(uuid, plugged)


def _online(call: guest.Call, count: int) -> int | None:
    """How many vCPUs the guest says are online after it was asked for `count`; None if nobody answers."""
    try:
        return guest.set_online(call, count, AGENT_SECONDS)
    except (UnreachableError, DeadlineError):
        return None


def _online_in_time(call: guest.Call, count: int) -> int | None:
    """As _online, for vCPUs that were just plugged: the guest's kernel knows them some moments later, and no event
    tells when."""
    deadline = time.monotonic() + ONLINE_SECONDS
    while True:
        try:
            return _online(call, count)
        except GuestError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _set_memory(host: Host, vm: Vm, step: p.SetMemory, margin: int) -> Applied:
    before = vm.allocation.memory
    if vm.state is State.OFF:
        host.domains.set_balloon(vm.uuid, step.target)
        return Applied(p.SetMemory(vm.uuid, before))
    if step.target < before:
        # Looked at again because the guest has worked since the plan was made.
        floor = memory_floor(host.domains.balloon(vm.uuid), margin)
        if floor is None and not step.force:
            raise RefusedError("the guest stopped reporting memory statistics.", "--force shrinks it blindly")
        if floor is not None and step.target < floor and not step.best_effort:
            raise RefusedError(f"the guest now uses more: the least it can have is {format_size(floor)}.")
    inverse = p.SetMemory(vm.uuid, before, force=True, best_effort=True)
    reached = host.domains.set_balloon(vm.uuid, step.target)
    if reached == step.target:
        return Applied(inverse, facts={"reached": reached})
    if step.best_effort:
        host.domains.set_balloon(vm.uuid, reached)
        return Applied(
            inverse, f"the guest gave only down to {format_size(reached)}", {"reached": reached, "partial": True}
        )
    host.domains.set_balloon(vm.uuid, before)
    raise GuestError(
        f"the guest's balloon stopped at {format_size(reached)} on the way to {format_size(step.target)}.",
        "--best-effort keeps what can be had",
    )
