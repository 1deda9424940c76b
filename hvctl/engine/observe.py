"""What is, joined from libvirt and the kernel: read once into immutable values before anything is decided."""

from __future__ import annotations

from dataclasses import replace

from hvctl.model.allocation import NicLimit
from hvctl.model.vm import Vm
from hvctl.ports import Host


def observe(host: Host, ref: str) -> Vm:
    """One VM with the bandwidth that the kernel enforces; NotFoundError."""
    return _with_network(host, host.domains.get(ref))


def observe_all(host: Host) -> tuple[Vm, ...]:
    return tuple(_with_network(host, vm) for vm in host.domains.list())


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
