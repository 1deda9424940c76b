"""libvirt asked directly, for what tests ask thousands of times: virsh would be a new process for each question."""

from __future__ import annotations

from functools import cache
from typing import Any

import libvirt
import libvirt_qemu

URI = "qemu:///system"
STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")


def lookup(name: str) -> Any:
    """A domain by name or uuid; AssertionError with libvirt's words, as a failed virsh is."""
    by_uuid = len(name) == 36 and name.count("-") == 4
    return told(lambda there: there.lookupByUUIDString(name) if by_uuid else there.lookupByName(name))


def state(name: str) -> str:
    """In the words of `virsh domstate`."""
    return STATES[told(lambda _: lookup(name).state()[0])]


def uuid(name: str) -> str:
    return str(lookup(name).UUIDString())


def names() -> list[str]:
    return sorted(d.name() for d in told(lambda there: there.listAllDomains()))


def xml(name: str, *, inactive: bool = False) -> str:
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
    return str(told(lambda _: lookup(name).XMLDesc(flags)))


def balloon(name: str) -> dict[str, int]:
    """What `virsh dommemstat` shows, KiB and seconds."""
    return dict(told(lambda _: lookup(name).memoryStats()))


def agent(name: str, request: str, seconds: int) -> str:
    return str(told(lambda _: libvirt_qemu.qemuAgentCommand(lookup(name), request, seconds, 0)))


def monitor(name: str, request: str) -> str:
    return str(told(lambda _: libvirt_qemu.qemuMonitorCommand(lookup(name), request, 0)))


def told(ask: Any) -> Any:
    """An answer, over another connection when libvirtd was started again since the last."""
    if not _connection().isAlive():
        _connection.cache_clear()
    try:
        return ask(_connection())
    except libvirt.libvirtError as e:
        raise AssertionError(f"error: {e}") from e


@cache
def _connection() -> Any:
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what is raised
    return libvirt.open(URI)
