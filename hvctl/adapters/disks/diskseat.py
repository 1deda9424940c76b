"""Where one disk sits in a running QEMU: its device, its two block nodes and the options they were made with.

A node's options cannot be asked for, and a node made again has to be the same one: they are taken from the process's
command line, or, for a disk that was plugged later, from what libvirt says of it and what QEMU shows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hvctl.adapters.libvirt.diskxml import DiskDriver, disk_driver
from hvctl.adapters.qemu.qmp import Query
from hvctl.errors import RefusedError, UnreachableError
from hvctl.model.vm import Disk, Process

QUESTIONS: Final[tuple[tuple[Query, Mapping[str, object]], ...]] = (
    ("query-status", {}),
    ("query-block", {}),
    ("query-named-block-nodes", {"flat": True}),
)
STANDIN: Final = "hvctl-standin-"

# What QEMU shows with a node and is the device's, or changes while the node stays the same one.
_LIMITS = ("iops", "bps", "group")
_NOT_A_NODES = ("write_threshold", "dirty-bitmaps")
_IMAGE_SHAPE = (
    "format",
    "filename",
    "cluster-size",
    "encrypted",
    "compressed",
    "backing-filename",
    "full-backing-filename",
    "backing-filename-format",
    "format-specific",
)


@dataclass(frozen=True, slots=True)
class Seat:
    """A disk's place. device is the QOM path that has the property `drive`; format and storage are the arguments of
    blockdev-add for its nodes; size and backing are the image's; tags tell one internal snapshot from another that has
    the same name; look is what QEMU shows of both nodes apart from the content."""

    life: Process
    target: str
    device: str
    path: str
    size: int
    backing: str | None
    tags: tuple[str, ...]
    format: dict[str, Any]
    storage: dict[str, Any]
    look: str
    thresholds: dict[str, int] = field(compare=False)

    @property
    def nodes(self) -> tuple[str, str]:
        return str(self.format["node-name"]), str(self.storage["node-name"])

    @property
    def standin(self) -> str:
        """The node that the device has while its own two are made again."""
        return STANDIN + self.target

    @property
    def tag_names(self) -> tuple[str, ...]:
        return tuple(str(json.loads(t)["name"]) for t in self.tags)

    @property
    def flushes(self) -> bool:
        """Whether what the guest flushes has to reach the host's disk."""
        return not self.format.get("cache", {}).get("no-flush", False)


@dataclass(frozen=True, slots=True)
class Sight:
    """The answers to QUESTIONS: what the guest does, which node each device has, what each node is, and how each device
    is throttled: QEMU shows that with the node that it has, and only here."""

    status: str
    devices: dict[str, str]
    nodes: dict[str, dict[str, Any]]
    limits: dict[str, dict[str, Any]] = field(default_factory=dict)


def sight(answers: Sequence[Any]) -> Sight:
    status, block, named = answers
    inserted = {_qom(b["qdev"]): b["inserted"] for b in block if b.get("qdev") and b.get("inserted") is not None}
    return Sight(
        status["status"],
        {device: node["node-name"] for device, node in inserted.items()},
        {n["node-name"]: n for n in named},
        {device: {k: v for k, v in node.items() if k.startswith(_LIMITS)} for device, node in inserted.items()},
    )


def find(seen: Sight, life: Process, disk: Disk, xml: str) -> Seat:
    """The seat of a disk of a running VM; xml: libvirt's live document. RefusedError if the disk is not one that can be
    made again as it is, or is on its stand-in: then what was begun has to be ended first."""
    name, path = disk.target, _known(disk.path, disk.target)
    device = _device(seen, _known(disk.node, name), name)
    node = seen.nodes[seen.devices[device]]
    if node["node-name"].startswith(STANDIN):
        raise RefusedError(f"disk {name} is on its stand-in: a reset of it was interrupted.", "hvctl recover")
    if node["drv"] != "qcow2" or node["file"] != path or node["ro"] or node.get("encrypted"):
        raise RefusedError(f"disk {name} is not a writable qcow2 image at {path}.", "hvctl vm show")
    if node.get("dirty-bitmaps"):
        raise RefusedError(
            f"disk {name} has a dirty bitmap, which would be lost.",
            "wait for its block job, or: virsh checkpoint-delete",
        )
    format, storage = _options(life, node, disk_driver(xml, name), seen)
    below = seen.nodes.get(storage["node-name"])
    if below is None or below["file"] != path or below["drv"] != "file" or below.get("dirty-bitmaps"):
        raise RefusedError(f"disk {name} is not a plain file behind its qcow2 image.")
    image = node["image"]
    return Seat(
        life=life,
        target=name,
        device=device,
        path=path,
        size=image["virtual-size"],
        backing=image.get("backing-filename"),
        tags=tags(image),
        format=format,
        storage=storage,
        look=look(node, below),
        thresholds=thresholds(node, below),
    )


def tags(image: Mapping[str, Any]) -> tuple[str, ...]:
    """The internal snapshots of an image, by everything QEMU and qemu-img say of them; sorted."""
    return tuple(sorted(json.dumps(s, sort_keys=True) for s in image.get("snapshots", ())))


def look(*nodes: Mapping[str, Any]) -> str:
    """What QEMU shows of nodes that comes from their options and the image's header."""
    shapes = []
    for node in nodes:
        kept = {k: v for k, v in node.items() if k not in _NOT_A_NODES and not k.startswith(_LIMITS)}
        image = {k: node["image"][k] for k in _IMAGE_SHAPE if k in node["image"]}
        cache = {k: node["cache"][k] for k in ("direct", "no-flush")}
        shapes.append({**kept, "image": image, "cache": cache})
    return json.dumps(shapes, sort_keys=True)


def thresholds(*nodes: Mapping[str, Any]) -> dict[str, int]:
    """Node to the offset whose writing libvirt wants to hear of."""
    return {n["node-name"]: n["write_threshold"] for n in nodes if n.get("write_threshold")}


def _known(value: str | None, target: str) -> str:
    if not value:
        raise RefusedError(f"disk {target} is not a file that libvirt names.", "virsh domblklist shows it")
    return value


def _qom(qdev: str) -> str:
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def _device(seen: Sight, alias: str, target: str) -> str:
    place = f"/machine/peripheral/{alias}"
    for device in (place, f"{place}/virtio-backend"):
        if device in seen.devices:
            return device
    raise RefusedError(f"QEMU has no device for disk {target}.", "hvctl vm show")


def _options(
    life: Process, node: Mapping[str, Any], driver: DiskDriver, seen: Sight
) -> tuple[dict[str, Any], dict[str, Any]]:
    started = _started_with(life.pid)
    format = started.get(node["node-name"])
    storage = started.get(format["file"]) if format is not None and isinstance(format.get("file"), str) else None
    if format is not None and storage is not None and storage.get("filename") == node["file"]:
        return format, storage
    return _plugged(node, driver, seen)


def _started_with(pid: int) -> dict[str, dict[str, Any]]:
    """The block nodes on a QEMU's command line, which libvirt writes as JSON."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
    except OSError as e:
        raise UnreachableError(f"the QEMU process {pid} is gone.", "hvctl vm list") from e
    found = {}
    for option, value in itertools.pairwise(words):
        if option == "-blockdev" and value.startswith("{"):
            node = json.loads(value)
            found[node["node-name"]] = node
    return found


def _plugged(node: Mapping[str, Any], driver: DiskDriver, seen: Sight) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that libvirt gives blockdev-add (qemuBlockStorageSourceGetBlockdev… in its sources)."""
    if driver.unusual:
        raise RefusedError(f"disk {driver.target} has <{driver.unusual[0]}>, which hvctl cannot make again.")
    name = f"libvirt-{driver.index}-storage"
    if node["node-name"] != f"libvirt-{driver.index}-format":
        raise RefusedError(
            f"the block node of disk {driver.target} is {node['node-name']}, which libvirt did not make."
        )
    cache = {key: node["cache"][key] for key in ("direct", "no-flush")}
    storage = {
        "driver": "file",
        "filename": node["file"],
        "node-name": name,
        "cache": cache,
        "auto-read-only": True,
        "discard": "unmap",
        **({"aio": driver.io} if driver.io else {}),
    }
    format = {
        "node-name": node["node-name"],
        "read-only": False,
        **({"discard": driver.discard} if driver.discard else {}),
        "detect-zeroes": node["detect_zeroes"],
        "cache": cache,
        "driver": "qcow2",
        "file": name,
        "backing": _backing(driver, seen),
    }
    return format, storage


def _backing(driver: DiskDriver, seen: Sight) -> str | None:
    if driver.backing_index is None:
        return None
    for kind in ("format", "storage"):
        if (name := f"libvirt-{driver.backing_index}-{kind}") in seen.nodes:
            return name
    raise RefusedError(f"the backing image of disk {driver.target} is not a block node of libvirt's.")
