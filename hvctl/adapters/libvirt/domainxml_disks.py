"""The disks of a domain's document: what each is, where in the machine it is plugged, and its limits."""

from __future__ import annotations

from typing import Any

from hvctl.model.allocation import DiskLimit
from hvctl.model.vm import Disk


def disks_of(root: Any) -> list[Any]:
    return [d for d in root.iterfind("devices/disk") if d.get("device", "disk") in ("disk", "lun")]


def disk_of(element: Any, root: Any) -> Disk:
    driver, source, target = element.find("driver"), element.find("source"), element.find("target")
    node = element.find("alias")
    return Disk(
        target=target.get("dev", "") if target is not None else "",
        name=element.findtext("serial"),
        path=(source.get("file") or source.get("dev") or source.get("name")) if source is not None else None,
        format=driver.get("type") if driver is not None else None,
        writable=element.find("readonly") is None,
        node=node.get("name") if node is not None else None,
        address=_address(element, root),
    )


def _address(element: Any, root: Any) -> str | None:
    """Where a device, or the controller that it hangs on, is on the PCI bus: 0000:00:05.0."""
    address = element.find("address")
    if address is None:
        return None
    if address.get("type") == "drive":
        kind = element.find("target").get("bus", "")
        index = address.get("controller", "0")
        held = (c for c in root.iterfind("devices/controller") if (c.get("type"), c.get("index")) == (kind, index))
        return next((_address(c, root) for c in held), None)
    parts = [address.get(key) for key in ("domain", "bus", "slot", "function")]
    if address.get("type") != "pci" or None in parts:
        return None
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*(int(str(p), 0) for p in parts))


def limit_of(element: Any) -> DiskLimit:
    target = element.find("target")

    def value(key: str) -> int | None:
        found = element.findtext(f"iotune/{key}")
        return (int(found) or None) if found else None

    return disk_limit(target.get("dev", "") if target is not None else "", value)


def disk_limit(target: str, value: Any) -> DiskLimit:
    """The limit in the block I/O tuning that `value(key)` reads. Separate limits for reads and writes, which hvctl does
    not set, count together when both are there, since only then the disk as a whole is limited."""

    def either(unit: str, suffix: str = "") -> int | None:
        total: int | None = value(f"total_{unit}{suffix}")
        if total:
            return total
        read, write = value(f"read_{unit}{suffix}"), value(f"write_{unit}{suffix}")
        return read + write if read and write else None

    burst_iops, burst_rate = either("iops_sec", "_max"), either("bytes_sec", "_max")
    length = (burst_iops and value("total_iops_sec_max_length")) or (burst_rate and value("total_bytes_sec_max_length"))
    return DiskLimit(
        target=target,
        iops=either("iops_sec"),
        rate=either("bytes_sec"),
        iops_burst=burst_iops,
        rate_burst=burst_rate,
        burst_seconds=length or None,
    )
