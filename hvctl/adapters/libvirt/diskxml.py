"""What libvirt's document of a running domain says of how it attached one disk, beyond what model.Disk holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hvctl.adapters.libvirt.domainxml_read import parse
from hvctl.errors import RefusedError

_UNUSUAL: Final = (
    "encryption",
    "source/encryption",
    "source/slices",
    "source/reservations",
    "driver/metadata_cache",
    "mirror",
    "transient",
)


@dataclass(frozen=True, slots=True)
class DiskDriver:
    """index and backing_index name block nodes; unusual are the elements that change how an image is opened and that
    only libvirt can repeat."""

    target: str
    index: int
    backing_index: int | None
    discard: str | None
    io: str | None
    unusual: tuple[str, ...]


def disk_driver(xml: str, target: str) -> DiskDriver:
    """From the live document; RefusedError if the running domain has no such disk with something in it."""
    disks = parse(xml).iterfind("devices/disk")
    disk = next((d for d in disks if target in (t.get("dev") for t in d.iterfind("target"))), None)
    if disk is None or disk.find("source[@index]") is None:
        raise RefusedError(f"the running domain has no disk {target} with a source.", "virsh domblklist shows them")
    backing, driver = disk.find("backingStore[@index]"), disk.find("driver")
    return DiskDriver(
        target=target,
        index=int(disk.find("source").get("index")),
        backing_index=int(backing.get("index")) if backing is not None else None,
        discard=driver.get("discard") if driver is not None else None,
        io=driver.get("io") if driver is not None else None,
        unusual=tuple(path for path in _UNUSUAL if disk.find(path) is not None),
    )
