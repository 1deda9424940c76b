"""A snapshot: a state of one QEMU process to return to. (Never "checkpoint": that is libvirt's dirty-bitmap mark.)"""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.vm import Process


@dataclass(frozen=True, slots=True)
class Binding:
    """What a snapshot fits: one QEMU process, its device tree and its block graph.

    devices and blocks are sorted, so two bindings can be compared and the difference be named.
    """

    process: Process
    devices: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot as its manifest tells. tag is the name of the internal snapshots in the overlays; nodes are the
    QEMU block nodes of the writable disks; ram_size and balloon are bytes; stored is what it takes on the host."""

    id: str
    name: str
    vm_uuid: str
    created_at: str
    binding: Binding
    tag: str
    nodes: tuple[str, ...]
    vmstate_node: str
    folder: str
    ram_path: str
    ram_size: int
    balloon: int
    vcpus: int
    stored: int
