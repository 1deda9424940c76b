"""The steps of saving a snapshot and loading it again; what each does stands in engine/archivehands.py."""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.archive import Hardware, Placement
from hvctl.model.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class WriteArchive:
    """Everything of a snapshot into files beside `folder`, while the guest runs."""

    vm_name: str
    snapshot: Snapshot
    hardware: Hardware
    folder: str


@dataclass(frozen=True, slots=True)
class PublishArchive:
    """The files get their name: an archive is whole or not there."""

    snapshot: Snapshot
    folder: str


@dataclass(frozen=True, slots=True)
class DropArchive:
    """Remove what WriteArchive wrote and nobody published."""

    snapshot: Snapshot
    folder: str


@dataclass(frozen=True, slots=True)
class ImportSnapshot:
    """RAM and device state of an archive into a snapshot's own place; it is not published yet."""

    snapshot: Snapshot
    folder: str


@dataclass(frozen=True, slots=True)
class RemoveImport:
    """Remove what ImportSnapshot made, also if it was bound to a process, which is gone then with its disks."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class PlaceDisks:
    """The saved disks take the place of the overlays of a VM that is off. `load` names what is kept of these."""

    uuid: str
    load: str
    disks: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class ReturnDisks:
    """The overlays that were there before the load are there again."""

    uuid: str
    load: str
    overlays: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleaseDisks:
    """The load is valid: the overlays from before it go. From here on it cannot be taken back."""

    uuid: str
    load: str
    overlays: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BindSnapshot:
    """The snapshot becomes one of the VM's new process, if that is the machine that it was taken of."""

    snapshot: Snapshot
    hardware: Hardware


ArchiveStep = (
    WriteArchive | PublishArchive | DropArchive | ImportSnapshot | PlaceDisks | ReturnDisks | ReleaseDisks
    | BindSnapshot | RemoveImport
)  # fmt: skip
