"""Domain XML written: the document of a new VM, and a foreign one edited in place for warm resets.

Elements are made with the XML library, so a name or label may hold any character and stays data.
"""

from __future__ import annotations

import json
from typing import Any

from lxml import etree

from hvctl.adapters.libvirt.domainxml_read import (
    AGENT,
    MONITOR_ID,
    PULSE,
    QEMU,
    Parts,
    has_agent,
    has_balloon,
    missing,
    monitor_path,
    parse,
    pulse_path,
    read,
    text,
)
from hvctl.adapters.libvirt.domainxml_record import HVCTL
from hvctl.codec import dump
from hvctl.errors import UsageError
from hvctl.model.allocation import Record
from hvctl.model.vm import Accel, DiskSpec, NicSpec, VmSpec

__all__ = ["HVCTL", "Parts", "adopted", "build", "missing", "read", "record_xml"]

# For every BAR of a PCI device QEMU builds its map of memory anew, once when it resets the machine and once when it
# loads device state, and in the modern layout of virtio it saves 1,024 queues of each device, used or not. So the
# devices of a new VM have transitional IDs and the legacy layout alone, which Linux, BSD and Windows know, and the two
# that move little have no BAR for MSI-X and no eventfd for each queue, which QEMU maps and unmaps at every pause. By
# type, so that a device which has the modern layout only can still be added.
_SMALL_STATE = (
    *(f"virtio-{kind}-pci.disable-modern=on" for kind in ("blk", "net", "serial", "balloon", "rng")),
    *(f"virtio-{kind}-pci.{setting}" for kind in ("serial", "rng") for setting in ("vectors=0", "ioeventfd=off")),
)
# The paravirtual task priority of 32-bit Windows XP: for it alone every reset of the machine and every load of its
# state waits for a vCPU, which emulated first throws away all the code that it had translated.
_NO_TASK_PRIORITY = "apic-common.vapic=off"
_PORTS = 8  # of the virtio-serial device, two in use; each has two queues, in libvirt's default of 31, too
# What stands after these elements in libvirt's order: a new <memoryBacking> goes before the first of them.
_AFTER_MEMORY = ("vcpu", "vcpus", "iothreads", "cputune", "numatune", "resource", "sysinfo", "os", "features", "cpu")


def record_xml(record: Record) -> str:
    """The element that virDomainSetMetadata takes; libvirt binds it to the namespace."""
    element = etree.Element("vm")
    element.text = json.dumps(dump(record), sort_keys=True)
    return etree.tostring(element, encoding="unicode")


def build(spec: VmSpec, owner: tuple[int, int]) -> str:
    """The document of a VM that hvctl creates; owner: uid and gid that libvirt runs QEMU as.

    Machine `pc`: no root ports and no AHCI, so fewer devices whose state a snapshot holds; it boots as fast as q35 (4 s
    emulated, both). Every vCPU but the first is hot-pluggable, or libvirt could not take back those there at boot.
    A guest that crashed is kept, since a warm reset can bring it back. There is no system management mode, which only
    UEFI with secure boot needs: emulated, it has a map of memory of its own, and each costs as much as the other. Nor
    are there an HPET (a guest without it takes the ACPI timer), a VMware port and a PS/2 controller, which nobody has
    a keyboard for: each is state that every reset makes anew.
    Disks run with cache='unsafe': they are overlays to throw away, and every stop and state load flushes them; a host
    that loses power loses what they held.
    """
    domain = etree.Element("domain", {"type": "kvm" if spec.accel is Accel.KVM else "qemu"}, {"qemu": QEMU})
    _add(domain, "name", spec.name)
    _add(domain, "uuid", spec.uuid)
    _add(domain, "genid")
    metadata = _add(domain, "metadata")
    if spec.record is not None:
        promised = etree.SubElement(metadata, f"{{{HVCTL}}}vm", nsmap={"hvctl": HVCTL})
        promised.text = json.dumps(dump(spec.record), sort_keys=True)
    _add(domain, "memory", str(spec.max_memory // 1024), unit="KiB")
    _add(domain, "currentMemory", str(spec.memory // 1024), unit="KiB")
    backing = _add(domain, "memoryBacking")
    _add(backing, "source", type="file")
    _add(backing, "access", mode="shared")
    _add(domain, "vcpu", str(spec.max_vcpus), current=str(spec.vcpus))
    vcpus = _add(domain, "vcpus")
    for number in range(spec.max_vcpus):
        enabled = "yes" if number < spec.vcpus else "no"
        _add(vcpus, "vcpu", id=str(number), enabled=enabled, hotpluggable="no" if number == 0 else "yes")
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine="pc")
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    _add(features, "vmport", state="off")
    _add(features, "smm", state="off")
    # Emulated, `maximum` is what QEMU emulates at best: with RDRAND, which seeds the guest's random generator at boot.
    _add(domain, "cpu", mode="host-passthrough" if spec.accel is Accel.KVM else "maximum")
    _add(_add(domain, "clock", offset="utc"), "timer", name="hpet", present="no")
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "preserve")
    power = _add(domain, "pm")
    _add(power, "suspend-to-mem", enabled="no")
    _add(power, "suspend-to-disk", enabled="no")
    devices = _add(domain, "devices")
    for disk in spec.disks:
        _add_disk(devices, disk)
    _add(devices, "controller", type="usb", model="none")
    _add(devices, "controller", type="virtio-serial", index="0", ports=str(_PORTS))
    for nic in spec.nics:
        _add_nic(devices, nic)
    _add(devices, "serial", type="pty")
    _add_agent(devices)
    if spec.pulse is not None:
        _add_pulse(devices, spec.pulse)
    _add(devices, "audio", id="1", type="none")
    video = _add(devices, "video")
    _add(video, "model", type="none")
    _add_balloon(devices)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    _add_owner(domain, owner)
    _add_arguments(domain, *(word for setting in (*_SMALL_STATE, _NO_TASK_PRIORITY) for word in ("-global", setting)))
    _add_arguments(domain, "-machine", "i8042=off")
    _add_kernel(domain, spec)
    _add_monitor(domain, spec.monitor)
    etree.indent(domain, space="  ")
    return text(domain) + "\n"


def adopted(xml: str, monitor_path_new: str, pulse_path_new: str) -> str:
    """The same document with what warm resets need and a definition can give: RAM in a shared file, hvctl's monitor, a
    balloon without free page reporting, the agent's channel, the sign-of-life port. Everything else stays as it is,
    comments and unknown elements too; what cannot be had by editing (disks that are not qcow2, …) is still named by
    `missing`."""
    root = parse(xml)
    backing = root.find("memoryBacking")
    if backing is None:
        backing = etree.Element("memoryBacking")
        anchor = next((c for c in root if c.tag in _AFTER_MEMORY), None)
        _insert(root, backing, len(root) if anchor is None else root.index(anchor))
    _settle(backing, "source", "type", "file")
    _settle(backing, "access", "mode", "shared")
    devices = root.find("devices")
    if devices is None:
        devices = _append(root, etree.Element("devices"))
    balloon = devices.find("memballoon")
    if not has_balloon(root):
        if balloon is not None:
            devices.remove(balloon)
        _add_balloon(devices)
    elif balloon.get("freePageReporting") == "on":
        balloon.set("freePageReporting", "off")
    if not has_agent(root):
        _add_agent(devices)
    if pulse_path(root) is None:
        _add_pulse(devices, pulse_path_new)
    if monitor_path(root) is None:
        root = _with_namespace(root)
        _add_monitor(root, monitor_path_new)
    return _document(root)


def plain(xml: str) -> str:
    """The same document as `adopted` writes one, so that the two differ only in what changes."""
    return _document(parse(xml))


def _document(root: Any) -> str:
    return "\n".join(etree.tostring(part, encoding="unicode", with_tail=False) for part in _top(root)) + "\n"


def _top(root: Any) -> list[Any]:
    """The root and the comments around it, which the XML library would join to one line."""
    return [*reversed(list(root.itersiblings(preceding=True))), root, *root.itersiblings()]


def _with_namespace(root: Any) -> Any:
    """The root with the prefix `qemu` bound, where libvirt prints it and people expect it; lxml can bind a prefix only
    when it makes an element."""
    if QEMU in root.nsmap.values() or "qemu" in root.nsmap:
        return root
    fresh = etree.Element(root.tag, dict(root.attrib), {**root.nsmap, "qemu": QEMU})
    fresh.text, fresh.tail = root.text, root.tail
    for before in reversed(list(root.itersiblings(preceding=True))):
        fresh.addprevious(before)
    for after in reversed(list(root.itersiblings())):
        fresh.addnext(after)
    fresh.extend(list(root))
    return fresh


def _add(parent: Any, tag: str, content: str | None = None, /, **attributes: str) -> Any:
    try:
        element = etree.SubElement(parent, tag, attributes)
        element.text = content
    except ValueError as e:
        raise UsageError(f"XML cannot hold this in <{tag}>: {content if content is not None else attributes!r}.") from e
    return element


def _insert(parent: Any, element: Any, index: int) -> Any:
    """Insert an element, laid out as its neighbours are, so that a diff shows the new lines alone."""
    before = parent[index - 1].tail if index > 0 else parent.text
    depth = sum(1 for _ in parent.iterancestors()) + 1
    etree.indent(element, space="  ", level=depth)
    parent.insert(index, element)
    element.tail = before
    return element


def _append(parent: Any, element: Any) -> Any:
    depth = sum(1 for _ in parent.iterancestors()) + 1
    etree.indent(element, space="  ", level=depth)
    closing = "\n" + "  " * (depth - 1)
    if len(parent):
        last = parent[-1]
        last.tail, closing = f"{closing}  ", last.tail
    elif not (parent.text or "").strip():
        parent.text = f"{closing}  "
    parent.append(element)
    element.tail = closing
    return element


def _settle(parent: Any, tag: str, attribute: str, value: str) -> None:
    element = parent.find(tag)
    if element is None:
        element = _append(parent, etree.Element(tag))
    element.set(attribute, value)


def _add_disk(devices: Any, spec: DiskSpec) -> None:
    disk = _add(devices, "disk", type="file", device="disk")
    _add(disk, "driver", name="qemu", type="qcow2", cache="unsafe", discard="unmap")
    _add(disk, "source", file=spec.path)
    # The chain is written down to its end, so that QEMU never guesses a format from bytes that a guest wrote.
    backing = _add(disk, "backingStore")
    if spec.backing is not None:
        backing.set("type", "file")
        _add(backing, "format", type=spec.backing_format or "raw")
        _keep_owner(_add(backing, "source", file=spec.backing))
        _add(backing, "backingStore")
    _add(disk, "target", dev=spec.target, bus="virtio")
    _add(disk, "serial", spec.name)


def _add_nic(devices: Any, spec: NicSpec) -> None:
    nic = _add(devices, "interface", type="bridge")
    _add(nic, "mac", address=spec.mac)
    _add(nic, "source", bridge=spec.bridge)
    _add(nic, "target", dev=spec.tap)
    _add(nic, "model", type="virtio")
    _add(nic, "rom", enabled="no")


def _add_agent(devices: Any) -> None:
    channel = etree.Element("channel", {"type": "unix"})
    _add(channel, "target", type="virtio", name=AGENT)
    _append(devices, channel)


def _add_pulse(devices: Any, path: str) -> None:
    """FIFOs, since these are always connected: a socket or pty would tell the guest of every end of a connection, and a
    port that is closed on one side of a state load and open on the other flaps. Their owner is QEMU's user already."""
    channel = etree.Element("channel", {"type": "pipe"})
    _add(channel, "source", path=path)
    _add(channel, "target", type="virtio", name=PULSE)
    _append(devices, channel)


def _add_balloon(devices: Any) -> None:
    """No automatic deflation: only then the guest's MemTotal follows the balloon."""
    balloon = etree.Element("memballoon", {"model": "virtio", "autodeflate": "off", "freePageReporting": "off"})
    _add(balloon, "stats", period="1")
    _append(devices, balloon)


def _add_owner(domain: Any, owner: tuple[int, int]) -> None:
    """QEMU's user as ever, and libvirt gives it the disks of this VM, and the overlays that virsh puts over them. What
    VMs share it must not get, or one hostile QEMU could write what every other VM boots from: see _keep_owner and
    _add_kernel."""
    label = _add(domain, "seclabel", type="static", model="dac", relabel="yes")
    _add(label, "label", "+{}:+{}".format(*owner))


def _keep_owner(source: Any) -> None:
    """libvirt leaves this image alone, and carries this with it through block jobs, snapshots and saved states."""
    _add(source, "seclabel", model="dac", relabel="no")


def _add_kernel(domain: Any, spec: VmSpec) -> None:
    """Past libvirt, which makes QEMU's user the owner of a <kernel> and <initrd>, and knows no exception for them
    (security_dac.c, virSecurityDACSetAllLabel). QEMU reads both once, at its start."""
    _add_arguments(domain, "-kernel", spec.kernel, "-initrd", spec.initrd, "-append", spec.cmdline)


def _add_monitor(domain: Any, path: str) -> None:
    chardev = f"socket,id={MONITOR_ID},path={path.replace(',', ',,')},server=on,wait=off"
    _add_arguments(domain, "-chardev", chardev, "-mon", f"chardev={MONITOR_ID},mode=control")


def _add_arguments(domain: Any, *values: str) -> None:
    commandline = domain.find(f"{{{QEMU}}}commandline")
    if commandline is None:
        commandline = _append(domain, etree.Element(f"{{{QEMU}}}commandline"))
    for value in values:
        try:
            argument = etree.Element(f"{{{QEMU}}}arg", {"value": value})
        except ValueError as e:
            raise UsageError(f"XML cannot hold this argument of QEMU: {value!r}.") from e
        _append(commandline, argument)
