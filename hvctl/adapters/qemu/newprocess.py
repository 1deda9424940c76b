"""What a saved snapshot needs of the QEMU process that it is loaded into: what machine that is, and the node of its
device state."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from hvctl.adapters.libvirt.domainxml_read import board
from hvctl.adapters.qemu.inside import Inside
from hvctl.errors import GuestError
from hvctl.model.archive import Hardware
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm

_CPU: Final = "/machine/unattached/device[0]"
_CACHE: Final = {"direct": False, "no-flush": True}


def hardware(held: Inside, vm: Vm, document: str) -> Hardware:
    """document: libvirt's of the running VM."""
    version = held.qmp.execute("query-version")["qemu"]
    _, cpu, devices = board(document)
    machine = str(held.qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
    return Hardware(
        qemu=f"{version['major']}.{version['minor']}.{version['micro']}",
        machine=machine.removesuffix("-machine"),
        accel=vm.accel.value,
        cpu=cpu,
        features=_features(held),
        devices=devices,
    )


def _features(held: Inside) -> str:
    """A digest of the CPU's feature words; empty where this QEMU or this architecture has none to tell."""
    try:
        kind = held.qmp.execute("qom-get", {"path": _CPU, "property": "type"})
        words: Any = held.qmp.execute("qom-get", {"path": _CPU, "property": "feature-words"})
    except GuestError:
        return ""
    return hashlib.sha256(json.dumps([kind, words], sort_keys=True).encode()).hexdigest()


def add_state_node(held: Inside, snapshot: Snapshot, image: Path) -> None:
    """The image is thrown away with the process, so nothing of it has to reach a disk."""
    file = {"driver": "file", "filename": str(image), "cache": _CACHE}
    held.qmp.execute(
        "blockdev-add", {"driver": "qcow2", "node-name": snapshot.vmstate_node, "file": file, "cache": _CACHE}
    )
    held.forget()
