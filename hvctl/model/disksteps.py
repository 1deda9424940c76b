"""The steps by which a disk goes back alone; what each does stands in engine/diskhands.py."""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.snapshot import Range, Snapshot


@dataclass(frozen=True, slots=True)
class CheckReleased:
    """After the hooks that have the guest let go of disks: go on only if it says that it uses none of them."""

    uuid: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrepareDisk:
    """Make the disk's image of the snapshot beside the one in use; nothing of the guest is touched."""

    snapshot: Snapshot
    target: str
    range: Range | None = None


@dataclass(frozen=True, slots=True)
class RestoreDisk:
    snapshot: Snapshot
    target: str
    range: Range | None = None


@dataclass(frozen=True, slots=True)
class FinishDisk:
    """End an interrupted reset of a disk: forward if the disk was away already, else back."""

    uuid: str
    target: str


@dataclass(frozen=True, slots=True)
class ReadyDisk:
    """After a reset of the disk: make its next one ready, which takes the time that the disk is in use."""

    snapshot: Snapshot
    target: str


@dataclass(frozen=True, slots=True)
class UnplugDisk:
    """Take the disk from the running guest, and wait until it has let go; `xml` plugs it again."""

    snapshot: Snapshot
    target: str
    xml: str


@dataclass(frozen=True, slots=True)
class RevertDisk:
    """The image of a disk that is unplugged is exchanged for what PrepareDisk made."""

    snapshot: Snapshot
    target: str


@dataclass(frozen=True, slots=True)
class PlugDisk:
    """Give the running guest the disk that was taken from it, in its old place; the VM's snapshots, which know its
    block nodes by name, learn the new names. `snapshot` has the old ones."""

    snapshot: Snapshot
    target: str
    xml: str


DiskStep = CheckReleased | PrepareDisk | RestoreDisk | FinishDisk | ReadyDisk | UnplugDisk | RevertDisk | PlugDisk
