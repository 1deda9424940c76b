"""What a host is: its size, its versions, and as whom QEMU runs there."""

from __future__ import annotations

from typing import Any

import libvirt

from hvctl.adapters.kernel import process
from hvctl.adapters.libvirt.calls import Connection
from hvctl.adapters.libvirt.domainxml_read import qemu_ids
from hvctl.errors import DeadlineError
from hvctl.model.host import HostFacts

_VERSION_SECONDS = 1.0
# libvirt may probe every QEMU that there is anew.
_SECONDS = 120.0


def facts(connection: Connection, uri: str) -> HostFacts:
    try:
        version = connection.call("tell QEMU's version", lambda c: _version(c.getVersion()), _VERSION_SECONDS)
    except DeadlineError:
        # libvirt probes QEMU anew, over and over where QEMU's user cannot open /dev/kvm: that is doctor's finding.
        version = "unknown"

    def look(opened: Any) -> HostFacts:
        uid, gid = qemu_owner(opened, connection.local)
        return HostFacts(
            name=opened.getHostname(),
            uri=uri,
            cpus=int(opened.getInfo()[2]),
            memory=int(opened.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"]) * 1024,
            hypervisor_version=version,
            libvirt_version=_version(opened.getLibVersion()),
            boot_id=process.boot_id(),
            cgroup=process.cgroup_version(),
            qemu_uid=uid,
            qemu_gid=gid,
        )

    return connection.call("tell the host's facts", look, seconds=_SECONDS)


def qemu_owner(opened: Any, local: bool) -> tuple[int, int]:
    """uid and gid of QEMU. The capabilities name them for certain, and may cost libvirt a probe of every QEMU there
    is: minutes."""
    known = process.qemu_owner() if local else None
    return known or qemu_ids(opened.getCapabilities())


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
