"""A snapshot: a state of one QEMU process to return to. (Never "checkpoint": that is libvirt's dirty-bitmap mark.)"""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.vm import Process, Region


@dataclass(frozen=True, slots=True)
class Binding:
    """What a snapshot fits: one QEMU process, its device tree and its block graph.

    devices and blocks are sorted, so two bindings can be compared and the difference be named.
    """

    process: Process
    devices: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes from start up to, not including, end: of guest-physical memory or of a disk."""

    start: int
    end: int

    def holds(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True, slots=True)
class StrayTag:
    """What is left in a VM's disks of a snapshot whose RAM is gone: the name of the internal snapshots, and the bytes
    that they alone hold."""

    tag: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot as its manifest tells.

    tag is the name of the internal snapshots in the overlays; targets are the writable disks (vda…) with QEMU's block
    node of each;
    regions are the pieces of guest RAM in the order of the pages of its layer; balloon is bytes; stored is what it
    takes on the host. parent is the snapshot whose RAM this one's layer only differs from. owned are ranges of memory
    that an application in the guest declared its own; mounted are the disks that the guest said were in use (None: it
    was not asked or did not answer); agent tells whether the guest agent was there. hidden: deleted, and kept only
    because another one still builds on its pages.
    """

    id: str
    name: str
    vm_uuid: str
    created_at: str
    binding: Binding
    tag: str
    targets: dict[str, str]
    vmstate_node: str
    folder: str
    regions: tuple[Region, ...]
    balloon: int
    vcpus: int
    stored: int
    parent: str | None = None
    owned: tuple[Range, ...] = ()
    mounted: tuple[str, ...] | None = None
    agent: bool = True
    hidden: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(sorted(self.targets.values()))

    @property
    def ram_size(self) -> int:
        return sum(r.size for r in self.regions)
