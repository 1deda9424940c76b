"""The block graph of a QEMU process: which nodes a snapshot needs, what forbids one, and what it is bound to.

Everything is read from the answers of query-block, query-named-block-nodes and query-jobs; nothing is asked here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvctl.adapters.qemu.qmp import JOB_ID
from hvctl.errors import RefusedError

_OVER = frozenset({"concluded", "null"})


@dataclass(frozen=True, slots=True)
class Node:
    """A named node. file is the host's path, backing that of the image below, tags its internal snapshots."""

    name: str
    driver: str
    writable: bool
    file: str
    backing: str | None
    bitmaps: tuple[str, ...]
    tags: tuple[str, ...]
    data_file: bool
    direct: bool = False


@dataclass(frozen=True, slots=True)
class DiskNode:
    """The active node of a guest disk. device is its alias without libvirt's path around it; size in bytes."""

    device: str
    node: str
    size: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes, guest disks and others' jobs at one moment. The nodes for device state that hvctl added stand apart."""

    nodes: tuple[Node, ...]
    disks: tuple[DiskNode, ...]
    jobs: tuple[tuple[str, str], ...]
    own_nodes: tuple[Node, ...] = ()

    @property
    def own(self) -> frozenset[str]:
        return frozenset(n.name for n in self.own_nodes)

    def writable(self) -> dict[str, str]:
        """Active node of each writable disk by its device. RefusedError if one of them cannot hold a snapshot now."""
        self._refuse_jobs()
        named = {n.name: n for n in self.nodes}
        for disk in self.disks:
            _refuse_unfit(disk, named[disk.node])
        return {d.device: d.node for d in self.disks}

    def tagged(self, tag: str) -> tuple[str, ...]:
        """Writable nodes, hvctl's own too, that hold an internal snapshot of this name."""
        return tuple(sorted(n.name for n in self.nodes + self.own_nodes if n.writable and tag in n.tags))

    @property
    def bypasses_cache(self) -> bool:
        """Whether a disk may be read by DMA of the host: into pages that were looked up before the read."""
        return any(n.direct for n in self.nodes)

    def fingerprint(self) -> tuple[str, ...]:
        """Sorted words, one string per fact, that stay the same as long as a snapshot fits."""
        words = [["disk", d.device, d.node, str(d.size)] for d in self.disks]
        words += [["job", job, kind] for job, kind in self.jobs]
        for n in self.nodes:
            words.append(["node", n.name, n.driver, "rw" if n.writable else "ro", n.file, *filter(None, [n.backing])])
            words += [["bitmap", bitmap, "on", n.name] for bitmap in n.bitmaps]
        return tuple(sorted(map(shlex.join, words)))

    def _refuse_jobs(self) -> None:
        if self.jobs:
            job, kind = self.jobs[0]
            raise RefusedError(
                f"a block job is running: {job or 'unnamed'} ({kind}).",
                "wait for it, or end it: virsh blockjob --abort",
            )


def overlays(blocks: Iterable[str], nodes: Iterable[str]) -> tuple[str, ...]:
    """The host's paths of these nodes, out of a fingerprint: where a snapshot's tags are when QEMU is gone."""
    facts = [shlex.split(b) for b in blocks]
    paths = {f[1]: f[4] for f in facts if f[0] == "node"}
    return tuple(paths[n] for n in nodes if n in paths)


def disk_nodes(blocks: Iterable[str]) -> tuple[str, ...]:
    """The nodes of the writable guest disks out of a fingerprint, sorted."""
    return tuple(sorted(f[2] for f in map(shlex.split, blocks) if f[0] == "disk"))


def graph(
    named: list[dict[str, Any]], block: list[dict[str, Any]], jobs: list[dict[str, Any]], own_folder: Path
) -> Graph:
    """The graph in QEMU's answers to query-named-block-nodes, query-block and query-jobs. Nodes whose file is below
    `own_folder` are hvctl's."""
    nodes = [_node(n) for n in named]
    own = tuple(n for n in nodes if own_folder in Path(n.file).parents)
    return Graph(tuple(n for n in nodes if n not in own), disks(block), others(jobs), own)


def disks(block: list[dict[str, Any]]) -> tuple[DiskNode, ...]:
    """The guest's writable disks in an answer to query-block."""
    return tuple(
        _disk(b) for b in block if "inserted" in b and not b["inserted"]["ro"] and (b.get("qdev") or b.get("device"))
    )


def others(jobs: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Jobs that run and are not hvctl's, in an answer to query-jobs."""
    return tuple(sorted((j["id"], j["type"]) for j in jobs if j["status"] not in _OVER and j["id"] != JOB_ID))


def _node(raw: dict[str, Any]) -> Node:
    image = raw["image"]
    special = image.get("format-specific", {}).get("data", {})
    return Node(
        name=raw["node-name"],
        driver=raw["drv"],
        writable=not raw["ro"],
        file=raw["file"],
        backing=raw.get("backing_file"),
        # Those without a name belong to a job, and the job is told instead.
        bitmaps=tuple(sorted(b["name"] for b in raw.get("dirty-bitmaps", []) if b.get("name"))),
        tags=tuple(sorted(s["name"] for s in image.get("snapshots", []))),
        data_file="data-file" in special,
        direct=raw.get("cache", {}).get("direct", False),
    )


def _disk(raw: dict[str, Any]) -> DiskNode:
    inserted = raw["inserted"]
    device = raw.get("qdev") or raw["device"]
    alias = device.removeprefix("/machine/peripheral/").removesuffix("/virtio-backend")
    return DiskNode(alias, inserted["node-name"], inserted["image"]["virtual-size"])


def _refuse_unfit(disk: DiskNode, node: Node) -> None:
    if node.driver != "qcow2":
        # A newer libvirt gives a raw disk no node of its format, only that of its file.
        kind = "raw" if node.driver in ("file", "host_device") else node.driver
        raise RefusedError(
            f"disk {disk.device} is {kind} ({node.file}): it cannot hold a snapshot.",
            "give the VM a qcow2 overlay over it, or make it read-only",
        )
    if node.data_file:
        raise RefusedError(f"disk {disk.device} keeps its data in a second file: it cannot hold a snapshot.")
    if node.bitmaps:
        raise RefusedError(
            f"disk {disk.device} has the dirty bitmap {node.bitmaps[0]!r}: QEMU cannot roll it back.",
            "delete the checkpoint that made it: virsh checkpoint-delete",
        )
