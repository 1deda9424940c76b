"""What is, joined from libvirt and the kernel: read once into immutable values before anything is decided."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hvctl.adapters.guest import agent
from hvctl.errors import DeadlineError, HvctlError, NotFoundError
from hvctl.model.allocation import NicLimit
from hvctl.model.vm import Balloon, State, Vm
from hvctl.ports import Host

AGENT_SECONDS = 1.0


def observe(host: Host, ref: str, *, guest: bool = False) -> Vm:
    """One VM with the bandwidth that the kernel enforces; NotFoundError. guest: the vCPUs are those that the guest
    says are online, which takes an answer of its agent."""
    vm = _with_network(host, host.domains.get(ref))
    return _with_online(vm, _online(host, vm) if guest else None)


def observe_all(host: Host, *, guest: bool = False) -> tuple[Vm, ...]:
    found = (_with_network(host, vm) for vm in host.domains.list())
    return tuple(_with_online(vm, _online(host, vm) if guest else None) for vm in found)


def balloon_of(host: Host, vm: Vm) -> Balloon:
    """Also of a VM that is gone since it was observed, or whose QEMU hangs: then nothing is reported."""
    try:
        return host.domains.balloon(vm.uuid)
    except (NotFoundError, DeadlineError):
        return Balloon(vm.allocation.memory)


def promised_vcpus(vm: Vm) -> Vm:
    """A VM with no more vCPUs than were promised, for a view that does not ask guests."""
    return _with_online(vm, None)


def _with_online(vm: Vm, online: int | None) -> Vm:
    """A vCPU that QEMU cannot unplug (TCG never can) stays plugged and is offline in the guest: what a VM may use is
    what is online. Nobody answering, the promise stands for it."""
    plugged = vm.allocation.vcpus
    if online is None:
        online = vm.record.allocation.vcpus if vm.record and vm.state.active else plugged
    return replace(vm, allocation=replace(vm.allocation, vcpus=max(1, min(plugged, online))))


def _online(host: Host, vm: Vm) -> int | None:
    if vm.state is not State.RUNNING or not vm.has_agent or vm.allocation.vcpus == 1:
        return None
    try:
        call = partial(host.domains.agent, vm.uuid)
        return len(agent.online_vcpus(call, AGENT_SECONDS))
    except HvctlError:
        return None


def _with_network(host: Host, vm: Vm) -> Vm:
    if not vm.nics:
        return vm
    limits: list[NicLimit] = []
    nics = []
    for nic in vm.nics:
        if nic.tap and vm.state.active:
            limits.append(host.network.limit(nic.tap, nic.mac))
            nics.append(replace(nic, foreign=host.network.foreign(nic.tap)))
        else:
            # Bandwidth exists only while the tap does: of a VM that is off the promise is what will be in force.
            limits.append(vm.record.allocation.nic(nic.mac) if vm.record else NicLimit(nic.mac))
            nics.append(nic)
    return replace(vm, nics=tuple(nics), allocation=replace(vm.allocation, nics=tuple(limits)))
