"""Which disks of a running domain can be unplugged, by what its document says."""

from __future__ import annotations

import pytest

from hvctl.adapters.libvirt.diskslot import disk_xml, find
from hvctl.adapters.libvirt.domainxml_read import QEMU
from hvctl.errors import NotFoundError, RefusedError

ACPI = "<features><acpi/></features>"
PC = "<controller type='pci' index='0' model='pci-root'/>"
Q35 = "<controller type='pci' index='0' model='pcie-root'/><controller type='pci' index='1' model='pcie-root-port'/>"
SCSI = "<controller type='scsi' index='0' model='virtio-scsi'/>"
KERNEL = f"<q:commandline xmlns:q='{QEMU}'><q:arg value='-kernel'/><q:arg value='/k'/></q:commandline>"


def slot(bus: int = 0, more: str = "function='0x0'") -> str:
    return f"<address type='pci' domain='0x0000' bus='0x{bus:02x}' slot='0x05' {more}/>"


def disk(target: str = "vdb", bus: str = "virtio", inner: str = "", kind: str = "file", where: str = "") -> str:
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/{target}' index='3'/>"
        f"<target dev='{target}' bus='{bus}'/><iotune><total_iops_sec>500</total_iops_sec></iotune>{inner}"
        f"<alias name='{bus}-{target}'/>{where or slot()}</disk>"
    )


def domain(*devices: str, system: str = "", features: str = ACPI, more: str = KERNEL) -> str:
    return f"<domain><os>{system}</os>{features}<devices>{''.join(devices)}</devices>{more}</domain>"


DRIVE = "<address type='drive' controller='0' bus='0' target='0' unit='1'/>"


@pytest.mark.parametrize(
    "xml",
    [
        domain(PC, disk()),
        domain(PC, disk(where=slot(1)), "<controller type='pci' index='1' model='pci-bridge'/>"),
        domain(Q35, disk(where=slot(1))),
        domain(Q35, SCSI, disk("sdb", "scsi", where=DRIVE)),
        domain(PC, disk("vda", inner="<boot order='1'/>"), disk(inner="<boot order='2'/>"), more=""),
        domain(PC, disk("vda"), disk(), system="<boot dev='hd'/>", more=""),
        # The kernel is given: the order of booting says nothing.
        domain(PC, disk(), system="<boot dev='hd'/>"),
    ],
)
def test_what_can_be_unplugged_can_be_plugged_as_it_was(xml: str) -> None:
    target = "sdb" if "sdb" in xml else "vdb"
    told = disk_xml(xml, target)
    assert "total_iops_sec" in told
    again = find(f"<domain><devices>{told}</devices></domain>", target)
    assert again == find(xml, target)
    assert again is not None
    assert again.alias.endswith(target)
    assert again.address


def without(mark: str) -> str:
    more = f"<q:commandline xmlns:q='{QEMU}'><q:arg value='-global'/><q:arg value='{mark}'/></q:commandline>"
    return domain(PC, disk(inner="<serial>data</serial>"), more=more)


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (domain(Q35, disk()), "it sits on pcie-root"),
        (domain(Q35.replace("root-port'/>", "root-port'><target hotplug='off'/></controller>"), disk(where=slot(1))),
         "it sits on pcie-root-port"),
        (domain(Q35, disk(where=slot(2)), "<controller type='pci' index='2' model='pci-bridge'/>"), "PCI Express"),
        (domain(PC, disk(), features=""), "no ACPI"),
        (domain(PC, disk(where=slot(0, "function='0x1'"))), "it shares its slot"),
        (domain(PC, disk(where=slot(0, "function='0x0' multifunction='on'"))), "it shares its slot"),
        (without("PIIX4_PM.acpi-root-pci-hotplug=off"), "without hot-plugging"),
        (domain(PC, disk(bus="ide", where=DRIVE)), "it is on the bus ide"),
        (domain(PC, SCSI.replace("virtio-scsi", "lsilogic"), disk(bus="scsi", where=DRIVE)), "controller is lsilogic"),
        (domain(PC, disk(inner="<shareable/>")), "others may have its image open"),
        (domain(PC, disk(kind="block")), "it is not a plain image file"),
        (domain(PC, disk(inner="<serial>root</serial>")), "it is the root disk"),
        (domain(PC, disk(), system="<kernel>/k</kernel><cmdline>quiet root=/dev/vdb1 ro</cmdline>"), "command line"),
        (domain(PC, disk("vda", inner="<boot order='2'/>"), disk(inner="<boot order='1'/>"), more=""), "boots from it"),
        (domain(PC, disk(), disk("vdc"), system="<boot dev='hd'/>", more=""), "boots from it"),
    ],
)  # fmt: skip
def test_what_cannot_is_refused_with_the_reason(xml: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        disk_xml(xml, "vdb")


def test_a_disk_that_is_not_there() -> None:
    assert find(domain(PC, disk()), "vdz") is None
    with pytest.raises(NotFoundError):
        disk_xml(domain(PC, disk()), "vdz")
