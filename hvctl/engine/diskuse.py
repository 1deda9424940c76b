"""Which disks a guest says it uses, by the names that the host has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hvctl.adapters.guest import guestdisk
from hvctl.adapters.guest.agent import Call
from hvctl.engine.applied import agent_call
from hvctl.errors import HvctlError
from hvctl.model.vm import Disk, State, Vm
from hvctl.ports import Host

AGENT_SECONDS = 2.0
T = TypeVar("T")


def disks_in_use(host: Host, vm: Vm) -> frozenset[str] | None:
    """Targets of the disks that the guest says it uses; None if it does not say. Its word may only harm itself. A guest
    has names of its own for disks, so where one sits counts, too: a doubtful one is in use."""
    words = _told(host, vm, guestdisk.mounted)
    return None if words is None else frozenset(d.target for d in vm.disks if _is_one_of(d, words))


def system_disks(host: Host, vm: Vm) -> frozenset[str]:
    """Targets of the disks that the guest says it runs from; none if it does not say."""
    words = _told(host, vm, guestdisk.system) or frozenset()
    return frozenset(d.target for d in vm.disks if _is_one_of(d, words))


def filled(host: Host, vm: Vm) -> dict[str, float]:
    """By target, the share in use of the fullest file system on a disk, as the guest says; a disk is absent if it does
    not say."""
    systems = _told(host, vm, guestdisk.used) or []
    found: dict[str, float] = {}
    for disk in vm.disks:
        own = [share for words, share in systems if _is_one_of(disk, words)]
        if own:
            found[disk.target] = max(own)
    return found


def _told(host: Host, vm: Vm, ask: Callable[[Call, float], T]) -> T | None:
    """What the guest's agent answers; None if there is nobody to ask, or no answer."""
    if not vm.has_agent or not vm.agent_connected or vm.state is not State.RUNNING:
        return None
    try:
        return ask(agent_call(host, vm.uuid), AGENT_SECONDS)
    except HvctlError:
        return None


def _is_one_of(disk: Disk, words: frozenset[str]) -> bool:
    return not words.isdisjoint({disk.target, disk.name, disk.address})
