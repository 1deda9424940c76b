"""Domain XML read: what a document of libvirt says about a VM, and what the domain lacks for warm resets.

With domainxml, which writes, the one door to lxml. Documents come from others, so entities are never resolved and the
size is bounded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from lxml import etree

from hvctl.adapters.libvirt.domainxml_disks import disk_of, disks_of, limit_of
from hvctl.adapters.libvirt.domainxml_record import record_of
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.allocation import DiskLimit, Record
from hvctl.model.vm import Accel, Disk, Nic

LIMIT = 4 << 20  # what libvirt carries: one domain with large metadata of somebody else must not hide all others
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
AGENT = "org.qemu.guest_agent.0"
PULSE = "org.hvctl.pulse.0"
MONITOR_ID = "hvctl"


@dataclass(frozen=True, slots=True)
class Parts:
    """What one document says of a model.Vm. memory is `currentMemory` in bytes: of a running domain what the balloon
    leaves the guest. cpu_shares is libvirt's raw value, on the scale of the host's cgroup version; quotas are in
    percent of one CPU."""

    uuid: str
    name: str
    accel: Accel
    vcpus: int
    max_vcpus: int
    memory: int
    max_memory: int
    cpu_shares: int | None
    cpu_quota: int | None
    disks: tuple[Disk, ...]
    limits: tuple[DiskLimit, ...]
    nics: tuple[Nic, ...]
    record: Record | None
    missing: tuple[str, ...]
    monitor: str | None
    pulse: str | None
    has_balloon: bool
    has_agent: bool
    agent_connected: bool
    console: str | None


def board(xml: str) -> tuple[str, str, tuple[str, ...]]:
    """QEMU's type of the machine, the CPU's model (or how it is chosen: host-passthrough, maximum), and in words the
    devices that have a place in the machine, with what is set for all of a kind."""
    root = parse(xml)
    seats = [_seat(d) for d in root.iterfind("devices/*") if d.find("address") is not None]
    options = [o for o in arguments(root) if o[0] in ("-global", "-machine")]
    seats += [f"{option.lstrip('-')} {value}" for option, value in options]
    seats += [
        f"{f.tag} {f.get('state', 'on')}" for kind in ("smm", "vmport") for f in root.iterfind(f"features/{kind}")
    ]
    seats += [f"hpet {t.get('present', 'yes')}" for t in root.iterfind("clock/timer[@name='hpet']")]
    devices = tuple(sorted(seats))
    machine = root.find("os/type")
    cpu = root.find("cpu")
    model = root.findtext("cpu/model") if cpu is not None and cpu.get("mode", "custom") == "custom" else None
    chosen = cpu.get("mode", "custom") if cpu is not None else "default"
    return (machine.get("machine", "") if machine is not None else ""), model or chosen, devices


def _seat(device: Any) -> str:
    """What a guest would notice if it changed: what the device is, and where it is plugged; not what is behind it."""
    model, mac, target = (device.find(name) for name in ("model", "mac", "target"))
    kind = device.get("type") if device.tag in ("controller", "hostdev") else None
    known = [
        device.tag,
        kind,
        device.get("model"),
        device.get("ports"),
        model.get("type") if model is not None else None,
    ]
    known += [mac.get("address") if mac is not None else None]
    known += [target.get("dev") or target.get("name") if target is not None and device.tag != "interface" else None]
    place = sorted(f"{key}={value}" for key, value in device.find("address").items())
    return " ".join([*filter(None, known), *place])


def parse(xml: str) -> Any:
    """The root element; RefusedError if it is too large, not XML, or not a domain."""
    data = xml.encode(errors="surrogateescape")
    if len(data) > LIMIT:
        raise RefusedError(f"a domain XML of {len(data)} bytes is too large (the limit is {LIMIT}).")
    return _root(data, "domain")


def _root(data: bytes, name: str) -> Any:
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, strip_cdata=False
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as e:
        raise RefusedError(f"this is not well-formed XML: {e}.") from e
    if root.getroottree().docinfo.internalDTD is not None:
        raise RefusedError("the XML has a document type; libvirt's documents have none.")
    if root.tag != name:
        raise RefusedError(f"the XML is not a <{name}> document.")
    return root


def text(root: Any) -> str:
    result: str = etree.tostring(root.getroottree(), encoding="unicode")
    return result


def part_text(part: Any) -> str:
    """One element of a document as a text of its own."""
    result: str = etree.tostring(part, encoding="unicode", with_tail=False)
    return result


def read(xml: str) -> Parts:
    """The parts of a model.Vm in a document that libvirt printed (so sizes are in KiB), live or inactive."""
    root = parse(xml)
    vcpu = root.find("vcpu")
    max_vcpus = int(vcpu.text) if vcpu is not None else 1
    max_memory = _kib(root.find("memory"))
    current = root.find("currentMemory")
    vcpus = int(vcpu.get("current", max_vcpus)) if vcpu is not None else 1
    return Parts(
        uuid=root.findtext("uuid", "").strip(),
        name=root.findtext("name", ""),
        accel=Accel.KVM if root.get("type") == "kvm" else Accel.TCG,
        vcpus=vcpus,
        max_vcpus=max_vcpus,
        memory=max_memory if current is None else _kib(current),
        max_memory=max_memory,
        cpu_shares=_integer(root, "cputune/shares"),
        cpu_quota=_quota(root, vcpus),
        disks=tuple(disk_of(d, root) for d in disks_of(root)),
        limits=tuple(limit_of(d) for d in disks_of(root)),
        nics=tuple(_nic(n) for n in root.iterfind("devices/interface")),
        record=record_of(root),
        missing=_missing(root),
        monitor=monitor_path(root),
        pulse=pulse_path(root),
        has_balloon=has_balloon(root),
        has_agent=has_agent(root),
        agent_connected=_agent_connected(root),
        console=_console(root),
    )


def missing(xml: str) -> tuple[str, ...]:
    """What a domain lacks for warm resets, in words; empty means that nothing is missing in its definition."""
    return _missing(parse(xml))


def _missing(root: Any) -> tuple[str, ...]:
    lacks: list[str] = []
    source, access = root.find("memoryBacking/source"), root.find("memoryBacking/access")
    if source is None or source.get("type") != "file" or access is None or access.get("mode") != "shared":
        lacks.append("guest RAM in a shared file")
    if root.find("memoryBacking/hugepages") is not None:
        lacks.append("guest RAM in ordinary pages (it uses huge pages)")
    if other := sorted({m.get("model", "") for m in root.iterfind("devices/memory")} - {"dimm"}):
        lacks.append(f"memory modules of the kind dimm (it has {', '.join(other)})")
    if monitor_path(root) is None:
        lacks.append("a second QMP monitor")
    if not has_balloon(root):
        lacks.append("a virtio balloon")
    elif root.find("devices/memballoon").get("freePageReporting") == "on":
        lacks.append("a balloon without free page reporting")
    if not has_agent(root):
        lacks.append("a guest agent channel")
    lacks += [
        f"disk {disk.target} as qcow2 (it is {disk.format or 'of no named format'})"
        for disk in (disk_of(d, root) for d in disks_of(root))
        if disk.writable and disk.format != "qcow2"
    ]
    if bypass := _bypasses(root):
        lacks.append(f"a guest without devices that write its RAM past QEMU (it has {', '.join(bypass)})")
    return tuple(lacks)


def _bypasses(root: Any) -> list[str]:
    found = ["a host device"] if root.find("devices/hostdev") is not None else []
    if any(n.get("type") in ("vhostuser", "vdpa", "hostdev") for n in root.iterfind("devices/interface")):
        found.append("a vhost-user or vDPA NIC")
    if any(d.get("type") in ("vhostuser", "nvme", "vhostvdpa") for d in root.iterfind("devices/disk")):
        found.append("a vhost-user or NVMe disk")
    if any(f.find("driver[@type='virtiofs']") is not None for f in root.iterfind("devices/filesystem")):
        found.append("virtiofs")
    return found


def monitor_path(root: Any) -> str | None:
    """The socket of hvctl's own QMP monitor, from QEMU arguments that really make one."""
    pairs = arguments(root)
    monitors = [_options(value) for option, value in pairs if option == "-mon"]
    if not any(m.get("chardev") == MONITOR_ID and m.get("mode") == "control" for m in monitors):
        return None
    for option, value in pairs:
        if option == "-chardev" and value.startswith("socket,") and _options(value).get("id") == MONITOR_ID:
            return _options(value).get("path")
    return None


def arguments(root: Any) -> list[tuple[str, str]]:
    """Each argument that QEMU gets past libvirt, with the one that follows it."""
    words = [a.get("value", "") for a in root.iterfind(f"{{{QEMU}}}commandline/{{{QEMU}}}arg")]
    return list(itertools.pairwise(words))


def _options(value: str) -> dict[str, str]:
    """QEMU's key=value list, in which a comma inside a value is written twice."""
    items = [item.replace("\0", ",") for item in value.replace(",,", "\0").split(",")]
    return {key: rest for key, equals, rest in (item.partition("=") for item in items) if equals}


def has_balloon(root: Any) -> bool:
    balloon = root.find("devices/memballoon")
    return balloon is not None and balloon.get("model", "none") != "none"


def pulse_path(root: Any) -> str | None:
    """The common part of the paths of the FIFOs behind the sign-of-life port; None where the domain has none."""
    for channel in root.iterfind("devices/channel[@type='pipe']"):
        source, target = channel.find("source"), channel.find("target")
        if target is not None and target.get("name") == PULSE and source is not None and source.get("path"):
            result: str = source.get("path")
            return result
    return None


def has_agent(root: Any) -> bool:
    return any(t.get("name") == AGENT for t in root.iterfind("devices/channel/target"))


def _agent_connected(root: Any) -> bool:
    """Whether the guest has the channel open; only the document of a running domain tells."""
    targets = root.iterfind("devices/channel/target")
    return any(t.get("name") == AGENT and t.get("state") == "connected" for t in targets)


def qemu_ids(capabilities: str) -> tuple[int, int]:
    """uid and gid that QEMU runs as, from the DAC labels in libvirt's capabilities; 0, 0 where libvirt sets none."""
    root = _root(capabilities.encode(), "capabilities")
    for model in root.iterfind("host/secmodel"):
        if model.findtext("model") == "dac":
            uid, _, gid = model.findtext("baselabel", "+0:+0").partition(":")
            return int(uid.lstrip("+")), int(gid.lstrip("+"))
    return 0, 0


def _kib(element: Any) -> int:
    if element is None:
        return 0
    if element.get("unit", "KiB") != "KiB":
        raise HvctlError(f"libvirt printed a size in {element.get('unit')}, where it always prints KiB.")
    return int(element.text) * 1024


def _integer(root: Any, path: str) -> int | None:
    found = root.findtext(path)
    return int(found) if found else None


def _quota(root: Any, vcpus: int) -> int | None:
    """Percent of one CPU for the whole VM: its own limit, or what the vCPUs' limits add up to."""
    whole = percent(_integer(root, "cputune/global_quota"), _integer(root, "cputune/global_period"))
    each = percent(_integer(root, "cputune/quota"), _integer(root, "cputune/period"), vcpus)
    return min((q for q in (whole, each) if q is not None), default=None)


def percent(quota: int | None, period: int | None, times: int = 1) -> int | None:
    """Percent of one CPU of a CFS quota and period in microseconds; None is unlimited (libvirt: 0 or less)."""
    return quota * times * 100 // (period or 100_000) if quota is not None and quota > 0 else None


def _nic(element: Any) -> Nic:
    mac, model = element.find("mac"), element.find("model")
    source, target = element.find("source"), element.find("target")
    return Nic(
        mac=mac.get("address", "") if mac is not None else "",
        model=model.get("type", "") if model is not None else "",
        bridge=(source.get("bridge") or source.get("network")) if source is not None else None,
        tap=target.get("dev") if target is not None else None,
    )


def _console(root: Any) -> str | None:
    for path in ("devices/serial[@type='pty']/source", "devices/console[@type='pty']/source"):
        source = root.find(path)
        if source is not None and source.get("path"):
            result: str = source.get("path")
            return result
    return None
