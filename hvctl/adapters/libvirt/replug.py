"""A disk taken from a running guest and given to it again, in the running domain alone: the definition keeps it, so
that a VM which ends in between boots with it."""

from __future__ import annotations

import time
from typing import Any, Final

import libvirt

from hvctl.adapters.libvirt.calls import Connection, clean, code_of, text_of
from hvctl.adapters.libvirt.diskslot import Slot, find
from hvctl.errors import GuestError, HvctlError

# A guest that hears of it lets go within a second or two, also one whose program writes to the disk.
_UNPLUG_SECONDS: Final = 20.0
# How long a disk is watched that somebody may have asked the guest for, before it counts as one that stays.
_SETTLE_SECONDS: Final = 2.0
_REREAD: Final = 0.5
_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE


def unplug(connection: Connection, uuid: str, target: str) -> None:
    def ask(c: Any) -> None:
        domain = c.lookupByUUIDString(uuid)
        slot = find(domain.XMLDesc(0), target)
        if slot is None:
            return
        try:
            domain.detachDeviceAlias(slot.alias, _LIVE)
        except libvirt.libvirtError as e:
            # It was asked for already, and is on its way.
            if "in the process of unplug" not in text_of(e) and _there(domain, target):
                raise

    refused = libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED
    with (
        connection.events(uuid, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED) as removed,
        connection.events(uuid, refused) as kept,
    ):
        connection.call(f"unplug {target} of {uuid}", ask)
        until = time.monotonic() + _UNPLUG_SECONDS
        while (left := until - time.monotonic()) > 0 and not kept.is_set():
            removed.clear()
            if _look(connection, uuid, target) is None:
                break
            removed.wait(min(left, _REREAD))
    if _look(connection, uuid, target) is None:
        # libvirt forgets a disk before it has QEMU close its image: a question to QEMU waits for the end of that.
        connection.call(f"ask QEMU of {uuid}", lambda c: c.lookupByUUIDString(uuid).memoryStats())
        return
    how = "refuses to let go" if kept.is_set() else f"did not let go within {_UNPLUG_SECONDS:g} s"
    raise GuestError(
        f"the guest {how} of disk {target}.",
        "should it do so later, `hvctl doctor --fix` plugs the disk again",
    )


def plug(connection: Connection, uuid: str, target: str, xml: str) -> None:
    with connection.events(uuid, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED) as removed:
        if _look(connection, uuid, target) is not None:
            # Whoever asked the guest for it may have died, and the guest still be about to let go.
            removed.wait(_SETTLE_SECONDS)
        connection.call(f"plug {target} of {uuid}", lambda c: _plug(c.lookupByUUIDString(uuid), target, xml))


def _plug(domain: Any, target: str, xml: str) -> None:
    wanted = find(f"<domain><devices>{xml}</devices></domain>", target)
    if not _there(domain, target):
        try:
            domain.attachDeviceFlags(xml, _LIVE)
        except libvirt.libvirtError as e:
            if code_of(e) == libvirt.VIR_ERR_NO_DOMAIN or not _there(domain, target):
                raise
    if find(domain.XMLDesc(0), target) != wanted:
        raise HvctlError(
            f"disk {target} of {clean(domain.name(), 80)} is in another slot than it was: no snapshot fits it.",
            "virsh dumpxml shows where it is",
        )


def _there(domain: Any, target: str) -> bool:
    return find(domain.XMLDesc(0), target) is not None


def _look(connection: Connection, uuid: str, target: str) -> Slot | None:
    return connection.call(f"look at {uuid}", lambda c: find(c.lookupByUUIDString(uuid).XMLDesc(0), target))
