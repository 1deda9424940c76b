"""Where a disk is plugged, and whether it can be unplugged while its guest runs, as libvirt's document tells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from hvctl.adapters.libvirt.domainxml_read import arguments, parse, part_text
from hvctl.errors import NotFoundError, RefusedError

_ROOT_SERIAL: Final = "root"  # what hvctl calls the disk with the image's root file system
_PORTS: Final = ("pcie-root-port", "pcie-switch-downstream-port")
_SCSI: Final = ("virtio-scsi", "virtio-transitional", "virtio-non-transitional")
_NO_HOTPLUG: Final = re.compile(r"hotplug[a-z-]*=(off|no|false)")


@dataclass(frozen=True, slots=True)
class Slot:
    """What a snapshot's device state goes by: the device's name, and where it is on its bus."""

    alias: str
    address: tuple[tuple[str, str], ...]


def find(xml: str, target: str) -> Slot | None:
    """The slot of a disk of a running domain; None if there is no such disk."""
    disk = _disk(parse(xml), target)
    if disk is None:
        return None
    alias, address = disk.find("alias"), disk.find("address")
    return Slot(
        alias.get("name", "") if alias is not None else "",
        tuple(sorted(address.items())) if address is not None else (),
    )


def disk_xml(xml: str, target: str) -> str:
    """The element of one disk, with which it can be plugged as it is. RefusedError, with the reason: it cannot be
    unplugged from this running domain, or it is the one that the guest was booted from."""
    root = parse(xml)
    disk = _disk(root, target)
    if disk is None:
        raise NotFoundError(f"the running domain has no disk {target}.", "virsh domblklist shows them")
    reason = _boots(root, disk) or _unfit(disk) or _fixed(root, disk)
    if reason:
        raise RefusedError(
            f"disk {target} cannot be unplugged from the running guest: {reason}.", "have it unmounted in the guest"
        )
    return part_text(disk)


def _disk(root: Any, target: str) -> Any:
    found = (d for d in root.iterfind("devices/disk") if target in (t.get("dev") for t in d.iterfind("target")))
    return next(found, None)


def _boots(root: Any, disk: Any) -> str | None:
    """Why the guest is taken to run from it: by hvctl's own name for it, by the kernel's command line, or, where no
    kernel is given, by the order of booting."""
    target = disk.find("target").get("dev")
    if disk.findtext("serial") == _ROOT_SERIAL:
        return "it is the root disk"
    words = [root.findtext("os/cmdline") or "", *(v for o, v in arguments(root) if o == "-append")]
    if any(re.search(rf"\broot=/dev/{re.escape(target)}\d*\b", w) for w in words):
        return "it is the root disk of the kernel's command line"
    if root.find("os/kernel") is not None or any(o == "-kernel" for o, _ in arguments(root)):
        return None
    disks = [d for d in root.iterfind("devices/disk") if d.get("device", "disk") == "disk"]
    ordered = [(int(b.get("order", "0")), d) for d in disks for b in d.iterfind("boot")]
    first = min(ordered, key=lambda o: o[0])[1] if ordered else None
    if not ordered and any(b.get("dev") == "hd" for b in root.iterfind("os/boot")):
        first = next(iter(disks), None)
    return "the guest boots from it" if first is disk else None


def _unfit(disk: Any) -> str | None:
    if disk.get("type") != "file" or disk.get("device", "disk") != "disk":
        return "it is not a plain image file"
    if disk.find("shareable") is not None or disk.find("transient") is not None:
        return "others may have its image open, or it is to be thrown away"
    return None


def _fixed(root: Any, disk: Any) -> str | None:
    """Why this machine cannot let it go, as far as the definition tells."""
    bus, address = disk.find("target").get("bus"), disk.find("address")
    if bus == "scsi":
        held = _controller(root, "scsi", address.get("controller", "0") if address is not None else "0")
        model = held.get("model") if held is not None else None
        return None if model in _SCSI else f"its controller is {model or 'not known'}"
    if bus != "virtio" or address is None or address.get("type") != "pci":
        return f"it is on the bus {bus}"
    if root.find("features/acpi") is None:
        return "the machine has no ACPI, which tells the guest"
    if address.get("multifunction") == "on" or int(address.get("function", "0"), 0):
        return "it shares its slot"
    if any(o == "-global" and _NO_HOTPLUG.search(v) for o, v in arguments(root)):
        return "the machine was started without hot-plugging"
    bridge = _controller(root, "pci", str(int(address.get("bus", "0"), 0)))
    model = bridge.get("model") if bridge is not None else None
    switch = bridge.find("target[@hotplug='off']") if bridge is not None else None
    if switch is not None or model not in ("pci-root", "pci-bridge", *_PORTS):
        return f"it sits on {model or 'a bus that is not known'}, where nothing can be unplugged"
    if model == "pci-bridge" and _controller(root, "pci", "0").get("model") != "pci-root":
        return "it sits on a bridge of a PCI Express machine"
    return None


def _controller(root: Any, kind: str, index: str) -> Any:
    found = (c for c in root.iterfind("devices/controller") if (c.get("type"), c.get("index")) == (kind, index))
    return next(found, None)
