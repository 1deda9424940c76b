"""The definition of a fake domain as XML, made when somebody asks: thousands of VMs need not carry theirs along."""

from __future__ import annotations

from html import escape

from hvctl.adapters.fake.state import FakeVm
from hvctl.adapters.libvirt.domainxml import build
from hvctl.adapters.libvirt.domainxml_read import read
from hvctl.errors import RefusedError
from hvctl.model.vm import DiskSpec, NicSpec, VmSpec

QEMU = (64055, 64055)


def document(vm: FakeVm) -> str:
    """What redefine() was given last, else what hvctl would have defined, or a bare domain that lacks everything."""
    if vm.xml:
        return vm.xml
    if vm.config_missing:
        names = f"<name>{escape(vm.name)}</name><uuid>{escape(vm.uuid)}</uuid>"
        return f"<domain type='qemu'>{names}<memory unit='KiB'>{vm.max_memory // 1024}</memory></domain>"
    spec = VmSpec(
        uuid=vm.uuid,
        name=vm.name,
        image="",
        accel=vm.accel,
        vcpus=vm.config.vcpus,
        max_vcpus=vm.max_vcpus,
        memory=vm.config.memory,
        max_memory=vm.max_memory,
        kernel=vm.kernel,
        initrd=vm.initrd,
        cmdline=vm.cmdline,
        folder=vm.folder,
        monitor=vm.monitor or "",
        disks=tuple(DiskSpec(d.name or "", d.target, d.path or "", 0) for d in [*vm.disks, *vm.unplugged]),
        nics=tuple(NicSpec(n.bridge or "", n.mac, n.tap or "") for n in vm.nics),
        record=vm.record,
    )
    return build(spec, QEMU)


def redefine(vm: FakeVm, xml: str) -> None:
    """Keep the document; of what it says the fake obeys only what warm resets need."""
    parts = read(xml)
    if (parts.uuid, parts.name) != (vm.uuid, vm.name):
        raise RefusedError(f"this is the definition of {parts.name!r}, not of {vm.name}.")
    vm.xml, vm.config_missing = xml, list(parts.missing)
    if not vm.state.active:
        vm.missing = list(parts.missing)
