"""Which disks a guest says it uses, by the names that the host has for them."""

from __future__ import annotations

from hvctl.adapters.guest import guestdisk
from hvctl.engine.applied import agent_call
from hvctl.errors import HvctlError
from hvctl.model.vm import State, Vm
from hvctl.ports import Host

AGENT_SECONDS = 2.0


def disks_in_use(host: Host, vm: Vm) -> frozenset[str] | None:
    """Targets of the disks that the guest says it uses; None if it does not say. Its word may only harm itself. A guest
    has names of its own for disks, so where one sits counts, too: a doubtful one is in use."""
    if not vm.has_agent or not vm.agent_connected or vm.state is not State.RUNNING:
        return None
    try:
        names = guestdisk.mounted(agent_call(host, vm.uuid), AGENT_SECONDS)
    except HvctlError:
        return None
    if names is None:
        return None
    return frozenset(d.target for d in vm.disks if not names.isdisjoint({d.target, d.name, d.address}))


def system_disks(host: Host, vm: Vm) -> frozenset[str]:
    """Targets of the disks that the guest says it runs from; none if it does not say."""
    if not vm.has_agent or not vm.agent_connected or vm.state is not State.RUNNING:
        return frozenset()
    try:
        words = guestdisk.system(agent_call(host, vm.uuid), AGENT_SECONDS)
    except HvctlError:
        return frozenset()
    return frozenset(d.target for d in vm.disks if not words.isdisjoint({d.target, d.name, d.address}))


def filled(host: Host, vm: Vm) -> dict[str, float]:
    """By target, the share in use of the fullest file system on a disk, as the guest says; a disk is absent if it does
    not say."""
    if not vm.has_agent or not vm.agent_connected or vm.state is not State.RUNNING:
        return {}
    try:
        systems = guestdisk.used(agent_call(host, vm.uuid), AGENT_SECONDS)
    except HvctlError:
        return {}
    found: dict[str, float] = {}
    for disk in vm.disks:
        own = [share for words, share in systems if not words.isdisjoint({disk.target, disk.name, disk.address})]
        if own:
            found[disk.target] = max(own)
    return found
