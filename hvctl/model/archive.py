"""A saved snapshot on a disk of the host, and what loading it into a new QEMU process takes."""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.snapshot import Range, Snapshot

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine that a QEMU process shows its guest, as far as saved device and CPU state depend on it.

    qemu is the version; machine QEMU's versioned type (pc-i440fx-7.2); accel kvm or tcg; cpu the model, or libvirt's
    mode where it names none; features are the CPU's feature words, empty where QEMU does not tell them; devices are in
    words, each with where it is plugged.
    """

    qemu: str
    machine: str
    accel: str
    cpu: str
    features: str = ""
    devices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"QEMU {self.qemu} {self.machine} {self.accel} {self.cpu}"


@dataclass(frozen=True, slots=True)
class Backing:
    """The image below an overlay; modified is its time in ns. A saved disk is only its difference to this very one."""

    path: str
    format: str
    size: int
    modified: int


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """A writable disk at the snapshot's state: `file` of the archive takes the place of `overlay`."""

    target: str
    file: str
    overlay: str
    size: int
    backing: Backing | None


@dataclass(frozen=True, slots=True)
class SavedFile:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Archive:
    """What the manifest of a saved snapshot says. pages are those of guest RAM that hold anything; room is bytes that
    its device state takes once it is loaded."""

    format: int
    saved_at: str
    vm_name: str
    snapshot: Snapshot
    hardware: Hardware
    pages: int
    room: int
    disks: tuple[SavedDisk, ...]
    files: tuple[SavedFile, ...]

    @property
    def overlays(self) -> tuple[str, ...]:
        return tuple(d.overlay for d in self.disks)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are needed and that are free, and of what."""

    where: str
    need: int
    free: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A disk's file of an archive, by its whole path, that takes the place of an overlay."""

    source: str
    overlay: str

    def __str__(self) -> str:
        return self.overlay


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save wrote, in bytes: RAM that held anything, that compressed, device state, disks."""

    ram: int
    compressed: int
    state: int
    disks: int


@dataclass(frozen=True, slots=True)
class RegionDifference:
    """Where guest RAM of one region differs: bytes from the region's start."""

    region: str
    bytes: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class DiskDifference:
    """Where a disk differs: bytes of the disk as its guest sees it, in whole clusters of `cluster` bytes."""

    target: str
    cluster: int
    bytes: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two snapshots of one VM."""

    ram: tuple[RegionDifference, ...]
    disks: tuple[DiskDifference, ...]
