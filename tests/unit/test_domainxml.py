"""Domain XML: golden documents, names that try to be markup, and foreign documents edited in place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from hvctl.adapters.libvirt import domainxml
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.allocation import Allocation, DiskLimit, NicLimit, Record
from hvctl.model.vm import Accel, DiskSpec, NicSpec, VmSpec

GOLDEN = Path(__file__).parent.parent / "golden"
QEMU = (64055, 64056)
UUID = "6e0a1f0e-5c1b-4b7e-9b52-0d3b3b1f8a01"

SPEC = VmSpec(
    uuid=UUID,
    name="web",
    image="micro",
    accel=Accel.TCG,
    vcpus=2,
    max_vcpus=4,
    memory=256 << 20,
    max_memory=1 << 30,
    kernel="/images/micro/vmlinuz",
    initrd="/images/micro/initrd",
    cmdline="console=ttyS0 quiet",
    folder="/vms/web",
    monitor="/vms/web/monitor.sock",
    disks=(
        DiskSpec("root", "vda", "/vms/web/root.qcow2", 2 << 30, "/images/debian/root.raw", "raw"),
        DiskSpec("data", "vdb", "/vms/web/data.qcow2", 64 << 20),
    ),
    nics=(NicSpec("br0", "52:54:00:00:00:01", "hv-web-0"),),
    record=Record(Allocation(2, 256 << 20), image="micro", labels={"tier": "front"}),
    pulse="/vms/web/pulse",
)


def golden(name: str, text: str) -> None:
    """To renew: delete the file, run the test once, read the diff."""
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} was missing and is written; look at it")
    assert text == path.read_text()


def lines(xml: str) -> set[str]:
    return {line.strip() for line in xml.splitlines()}


# --- new VMs


def test_a_new_vm_is_this_document() -> None:
    golden("vm-tcg.xml", domainxml.build(SPEC, QEMU))


def test_under_kvm_only_type_and_cpu_differ() -> None:
    tcg, kvm = domainxml.build(SPEC, QEMU), domainxml.build(replace(SPEC, accel=Accel.KVM), QEMU)
    assert lines(kvm) - lines(tcg) == {
        '<domain xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0" type="kvm">',
        '<cpu mode="host-passthrough"/>',
    }


def test_a_new_vm_reads_back_as_it_was_asked_for() -> None:
    parts = domainxml.read(domainxml.build(SPEC, QEMU))
    assert (parts.uuid, parts.name, parts.accel) == (UUID, "web", Accel.TCG)
    assert (parts.vcpus, parts.max_vcpus, parts.memory, parts.max_memory) == (2, 4, 256 << 20, 1 << 30)
    assert [(d.target, d.name, d.path, d.format, d.writable) for d in parts.disks] == [
        ("vda", "root", "/vms/web/root.qcow2", "qcow2", True),
        ("vdb", "data", "/vms/web/data.qcow2", "qcow2", True),
    ]
    assert [(n.mac, n.bridge, n.tap, n.model) for n in parts.nics] == [
        ("52:54:00:00:00:01", "br0", "hv-web-0", "virtio")
    ]
    assert parts.record == SPEC.record
    assert parts.missing == ()
    assert parts.monitor == SPEC.monitor
    assert parts.pulse == SPEC.pulse
    assert parts.has_agent
    assert parts.has_balloon


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
XML_TEXT = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=40)


@given(name=XML_TEXT, cmdline=XML_TEXT, path=XML_TEXT, labels=st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=3))
def test_markup_in_names_paths_and_labels_stays_data(
    name: str, cmdline: str, path: str, labels: dict[str, str]
) -> None:
    record = Record(Allocation(1, 1 << 28, nics=(NicLimit(name, 1, 2),)), labels=labels)
    spec = replace(
        SPEC,
        name=name,
        cmdline=cmdline,
        monitor=f"/{path}",
        disks=(DiskSpec(name, "vda", f"/{path}", 1),),
        record=record,
    )
    xml = domainxml.build(spec, QEMU)
    parts = domainxml.read(xml)
    assert parts.name == name
    assert parts.monitor == f"/{path}"
    assert (parts.disks[0].name, parts.disks[0].path) == (name, f"/{path}")
    assert parts.record == record
    plain = [e.tag for e in etree.fromstring(domainxml.build(replace(SPEC, disks=spec.disks), QEMU).encode()).iter()]
    assert [e.tag for e in etree.fromstring(xml.encode()).iter()] == plain


def test_characters_that_xml_cannot_hold_are_refused() -> None:
    with pytest.raises(HvctlError, match="XML cannot hold"):
        domainxml.build(replace(SPEC, cmdline="quiet\x00"), QEMU)


def test_libvirt_is_given_nothing_that_vms_share() -> None:
    """It would make QEMU's user the owner of what it finds in <os> and of each image without this mark."""
    root = etree.fromstring(domainxml.build(SPEC, QEMU).encode())
    assert root.find("os/kernel") is root.find("os/initrd") is root.find("os/cmdline") is None
    shared = [s for s in root.iterfind("devices/disk//source") if "/images/" in s.get("file", "")]
    assert [[(label.get("model"), label.get("relabel")) for label in s] for s in shared] == [[("dac", "no")]]
    own = [s for s in root.iterfind("devices/disk//source") if "/images/" not in s.get("file", "")]
    assert [len(s) for s in own] == [0, 0], "virsh could not put an overlay over these"
    assert root.find("seclabel").get("relabel") == "yes"


@given(cmdline=XML_TEXT)
def test_qemu_gets_the_kernel_line_as_one_argument(cmdline: str) -> None:
    root = etree.fromstring(domainxml.build(replace(SPEC, cmdline=cmdline), QEMU).encode())
    arguments = [a.get("value") for a in root.iter(f"{{{domainxml.QEMU}}}arg")]
    kernel, initrd, append = (arguments[arguments.index(o) + 1] for o in ("-kernel", "-initrd", "-append"))
    assert (kernel, initrd, append) == (SPEC.kernel, SPEC.initrd, cmdline)


# --- hostile documents


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("", "well-formed"),
        ("<domain>", "well-formed"),
        ("<network/>", "not a <domain>"),
        ("<domain>" + " " * (4 << 20) + "</domain>", "too large"),
        ('<!DOCTYPE domain [<!ENTITY a "b">]><domain><name>&a;</name></domain>', "document type"),
        ('<!DOCTYPE domain SYSTEM "file:///etc/hostname"><domain/>', "document type"),
    ],
)
def test_documents_that_are_no_domain_or_bring_entities_are_refused(xml: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        domainxml.read(xml)


def test_a_record_that_is_not_one_counts_as_none() -> None:
    xml = domainxml.build(SPEC, QEMU)
    broken = re.sub(r"(<hvctl:vm [^>]*>)[^<]*", r"\1{&quot;allocation&quot;: 5}", xml)
    assert broken != xml
    assert domainxml.read(broken).record is None


# --- foreign documents

FOREIGN = """\
<!-- made by hand, keep me -->
<domain type='kvm' id='3'>
  <name>a&amp;b &lt;x&gt; "q" 'ü'</name>
  <uuid>6e0a1f0e-5c1b-4b7e-9b52-0d3b3b1f8a02</uuid>
  <metadata>
    <!-- a comment inside -->
    <other:thing xmlns:other="urn:other" level="1"><other:deep>text</other:deep> tail</other:thing>
  </metadata>
  <memory unit='KiB'>1048576</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static' current='1'>2</vcpu>
  <cputune>
    <shares>2048</shares>
    <period>100000</period>
    <quota>25000</quota>
  </cputune>
  <unknown answer='42'><![CDATA[<&>]]></unknown>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/pool/x.img'/>
      <target dev='sda' bus='sata'/>
      <iotune>
        <read_iops_sec>100</read_iops_sec>
        <write_iops_sec>50</write_iops_sec>
        <total_bytes_sec>1048576</total_bytes_sec>
        <total_bytes_sec_max>2097152</total_bytes_sec_max>
        <total_bytes_sec_max_length>10</total_bytes_sec_max_length>
      </iotune>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sdb' bus='sata'/>
      <readonly/>
    </disk>
    <memballoon model='virtio' freePageReporting='on'/>
    <!-- the end -->
  </devices>
</domain>
<!-- after -->
"""


def test_a_foreign_domain_is_read() -> None:
    parts = domainxml.read(FOREIGN)
    assert parts.name == "a&b <x> \"q\" 'ü'"
    assert parts.accel is Accel.KVM
    assert parts.cpu_shares == 2048
    assert parts.cpu_quota == 25
    assert parts.limits == (DiskLimit("sda", iops=150, rate=1 << 20, rate_burst=2 << 20, burst_seconds=10),)
    assert parts.record is None
    assert parts.missing == (
        "guest RAM in a shared file",
        "a second QMP monitor",
        "a balloon without free page reporting",
        "a guest agent channel",
        "disk sda as qcow2 (it is raw)",
    )


def test_adoption_is_this_document() -> None:
    golden("adopted.xml", domainxml.adopted(FOREIGN, "/vms/x/monitor.sock", "/vms/x/pulse"))


def test_adoption_mends_what_a_definition_can_give_and_names_the_rest() -> None:
    after = domainxml.adopted(FOREIGN, "/vms/x,y/monitor.sock", "/vms/x,y/pulse")
    assert domainxml.missing(after) == ("disk sda as qcow2 (it is raw)",)
    assert domainxml.read(after).monitor == "/vms/x,y/monitor.sock"
    assert domainxml.read(after).pulse == "/vms/x,y/pulse"


def test_adoption_only_adds_or_changes_what_it_is_for() -> None:
    after = domainxml.adopted(FOREIGN, "/m.sock", "/p")
    kept = [line for line in FOREIGN.splitlines() if "<domain " not in line and "<memballoon" not in line]
    found = iter(re.sub(r"'", '"', line) for line in after.splitlines())
    assert all(re.sub(r"'", '"', line) in found for line in kept), "a line is gone or at another place"


def test_adopting_twice_is_adopting_once() -> None:
    once = domainxml.adopted(FOREIGN, "/m.sock", "/p")
    assert domainxml.adopted(once, "/other.sock", "/other") == once


def test_adoption_keeps_qemu_arguments_of_others() -> None:
    theirs = FOREIGN.replace(
        "<domain type", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' type"
    ).replace("</devices>\n", "</devices>\n  <qemu:commandline>\n    <qemu:arg value='-s'/>\n  </qemu:commandline>\n")
    after = domainxml.adopted(theirs, "/m.sock", "/p")
    assert re.findall(r'qemu:arg value="([^"]*)"', after) == [
        "-s",
        "-chardev",
        "socket,id=hvctl,path=/m.sock,server=on,wait=off",
        "-mon",
        "chardev=hvctl,mode=control",
    ]


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["-chardev", "socket,id=hvctl,path=/a,server=on", "-mon", "chardev=hvctl,mode=control"], "/a"),
        (["-chardev", "socket,id=hvctl,path=/a,,b,server=on", "-mon", "chardev=hvctl,mode=control"], "/a,b"),
        (["-chardev", "socket,id=hvctl,path=/a,server=on"], None),
        (["-chardev", "socket,id=hvctl,path=/a,server=on", "-mon", "chardev=hvctl,mode=readline"], None),
        (["-chardev", "pipe,id=hvctl,path=/a", "-mon", "chardev=hvctl,mode=control"], None),
        (["-mon", "chardev=hvctl,mode=control"], None),
    ],
)
def test_a_monitor_counts_only_if_qemu_would_open_it(arguments: list[str], path: str | None) -> None:
    rendered = "".join(f'<qemu:arg value="{a}"/>' for a in arguments)
    xml = (
        '<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">'
        f"<qemu:commandline>{rendered}</qemu:commandline></domain>"
    )
    assert domainxml.read(xml).monitor == path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("org.hvctl.pulse.0", "org.example.0"),
        ('<channel type="pipe">', '<channel type="pty">'),
        ('<source path="/vms/web/pulse"/>', "<source/>"),
    ],
)
def test_a_domain_without_the_sign_of_life_port_lacks_nothing(before: str, after: str) -> None:
    xml = domainxml.build(SPEC, QEMU)
    assert before in xml
    parts = domainxml.read(xml.replace(before, after))
    assert (parts.pulse, parts.missing) == (None, ())
    older = domainxml.read(domainxml.build(replace(SPEC, pulse=None), QEMU))
    assert (older.pulse, older.missing) == (None, ())


@pytest.mark.parametrize(
    ("before", "after", "lacks"),
    [
        ('mode="shared"', 'mode="private"', "guest RAM in a shared file"),
        ('<source type="file"/>', '<source type="memfd"/>', "guest RAM in a shared file"),
        ('<source type="file"/>', '<source type="file"/><hugepages/>', "ordinary pages"),
        ("<audio ", "<hostdev/><audio ", "past QEMU"),
        ("<audio ", '<filesystem><driver type="virtiofs"/></filesystem><audio ', "virtiofs"),
        ("<audio ", '<interface type="vhostuser"/><audio ', "vhost-user"),
        ("<audio ", '<memory model="nvdimm"/><audio ', "of the kind dimm"),
        ("org.qemu.guest_agent.0", "org.example", "agent"),
        ('<memballoon model="virtio"', '<memballoon model="none"', "balloon"),
        ('type="qcow2"', 'type="raw"', "qcow2"),
    ],
)
def test_each_thing_that_warm_resets_need_is_missed(before: str, after: str, lacks: str) -> None:
    xml = domainxml.build(SPEC, QEMU)
    assert before in xml
    assert any(lacks in m for m in domainxml.missing(xml.replace(before, after)))
