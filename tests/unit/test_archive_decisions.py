"""What a saved snapshot fits, before anything is touched, and what the definition has to say for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvctl.adapters.libvirt.domainxml_read import board
from hvctl.decide.archive import hardware_difference, no_room, plugged_vcpus, refuse_load, starts_with
from hvctl.model.allocation import Allocation, Record
from hvctl.model.archive import FORMAT, Archive, Backing, Hardware, Room, SavedDisk
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Process, Region, State
from unit.vms import MAX_MEMORY, MIB, vm_with

SAVED = Hardware("7.2.22", "pc-i440fx-7.2", "tcg", "maximum", "words", ("disk vda slot=3", "rng virtio slot=6"))


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (SAVED, None),
        (replace(SAVED, qemu="7.2.5"), None),
        (replace(SAVED, qemu="unknown"), None),
        (replace(SAVED, qemu="7.20.22"), "host has 7.20.22"),
        (replace(SAVED, qemu="10.0.2"), "saved by QEMU 7.2.22"),
        (replace(SAVED, machine="pc-i440fx-8.0"), "pc-i440fx-8.0"),
        (replace(SAVED, accel="kvm"), "kvm"),
        (replace(SAVED, cpu="host-model"), None),
        (replace(SAVED, cpu="EPYC"), "EPYC"),
        (replace(SAVED, features=""), None),
        (replace(SAVED, features="others"), "features"),
        (replace(SAVED, devices=SAVED.devices[:1]), "'rng virtio slot=6' is gone"),
        (replace(SAVED, devices=(*SAVED.devices, "rng virtio slot=7")), "'rng virtio slot=7' is new"),
    ],
)
def test_the_machine_must_be_the_same(now: Hardware, why: str | None) -> None:
    found = hardware_difference(SAVED, now)
    assert (found is None) == (why is None)
    assert why is None or (found is not None and why in found)


VM = vm_with(Allocation(1, 256 * MIB), State.OFF)
BELOW = Backing("/images/root.qcow2", "qcow2", 100, 5)
SNAPSHOT = Snapshot(
    "1", "s", VM.uuid, "2026-01-01T00:00:00Z",
    Binding(Process(7, 8, "boot"), ("balloon0 virtio", "vcpu core-id=0", "vcpu core-id=1"), ()), "hvctl-1",
    {"vda": "n0", "vdb": "n1"}, "state", "/s/1", (Region("pc.ram", "/ram", MAX_MEMORY),), 128 * MIB, 1, 0,
)  # fmt: skip
ARCHIVE = Archive(
    FORMAT, "2026-01-02T00:00:00Z", "a", SNAPSHOT, SAVED, 1, 1,
    tuple(
        SavedDisk(d.target, f"disk-{d.target}.qcow2", str(d.path), 1, below)
        for d, below in zip(VM.disks, (BELOW, None), strict=True)
    ),
    (),
)  # fmt: skip
BACKINGS = {str(VM.disks[0].path): BELOW, str(VM.disks[1].path): None}


@pytest.mark.parametrize(
    ("backings", "why"),
    [
        (BACKINGS, None),
        (BACKINGS | {"/d/vda": replace(BELOW, modified=6)}, "was changed since"),
        (BACKINGS | {"/d/vda": replace(BELOW, path="/images/other.qcow2")}, "is /images/other.qcow2"),
        (BACKINGS | {"/d/vda": None}, "is none"),
        (BACKINGS | {"/d/vdb": BELOW}, "was none"),
    ],
)
def test_the_images_below_must_be_the_same(backings: dict[str, Backing | None], why: str | None) -> None:
    found = refuse_load(VM, ARCHIVE, SAVED, backings)
    assert (found is None) == (why is None)
    assert why is None or (found is not None and why in found.message and found.hint is not None)


def test_the_definition_gets_the_vcpus_that_were_plugged() -> None:
    """One of them may have been offline in the guest: what is promised are those that were online."""
    record = Record(Allocation(4, 512 * MIB, cpu_quota=150))
    assert plugged_vcpus(SNAPSHOT) == 2
    assert starts_with(SNAPSHOT, record) == Allocation(2, 512 * MIB, cpu_quota=150)
    assert plugged_vcpus(replace(SNAPSHOT, binding=replace(SNAPSHOT.binding, devices=()))) == 1


def test_room_is_refused_where_it_lacks() -> None:
    rooms = (Room("/a", 10, 10), Room("/b", 3 * MIB, 2 * MIB), Room("/c", 1, -5))
    found = no_room(rooms, "load it")
    assert found is not None
    assert "3 MiB of /b" in found.message
    assert "2 MiB are free" in found.message
    assert no_room(rooms[:1], "load it") is None


DOCUMENT = """<domain>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
  {cpu}
  <devices>
    <disk type='file' device='disk'><source file='/secret'/><target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='{slot}' function='0x0'/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='{tap}'/>
      <model type='virtio'/><address type='pci' slot='0x04'/></interface>
    <serial type='pty'><target port='0'/></serial>
  </devices>
</domain>"""


def document(cpu: str = "<cpu mode='maximum'/>", slot: str = "0x03", tap: str = "vnet0") -> str:
    return DOCUMENT.format(cpu=cpu, slot=slot, tap=tap)


def test_a_document_tells_what_the_guest_sees() -> None:
    machine, cpu, devices = board(document())
    assert (machine, cpu) == ("pc-i440fx-7.2", "maximum")
    assert devices == (
        "disk vda bus=0x00 domain=0x0000 function=0x0 slot=0x03 type=pci",
        "interface virtio 52:54:00:00:00:01 slot=0x04 type=pci",
    )
    # What the host gives it behind that does not count.
    assert board(document(tap="hv1")) == board(document())
    assert board(document(slot="0x05")) != board(document())


def test_what_is_set_for_all_devices_of_a_kind_counts_as_devices() -> None:
    """Their state is another one, and QEMU would find that out in the middle of a load."""
    arguments = "<qemu:arg value='-global'/><qemu:arg value='virtio-blk-pci.disable-modern=on'/>"
    arguments += "<qemu:arg value='-machine'/><qemu:arg value='i8042=off'/>"
    other = DOCUMENT.replace("<domain>", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>")
    other = other.replace("<devices>", "<features><vmport state='off'/><smm state='off'/></features><devices>")
    timers = "<timer name='rtc' tickpolicy='catchup'/><timer name='hpet' present='no'/>"
    other = other.replace("<devices>", f"<clock offset='utc'>{timers}</clock><devices>")
    other = other.replace("</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>")
    after = board(other.format(cpu="", slot="0x03", tap=""))[2]
    set_for_all = {"global virtio-blk-pci.disable-modern=on", "machine i8042=off", "smm off", "vmport off", "hpet no"}
    assert set(after) - set(board(document())[2]) == set_for_all


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        ("", "default"),
        ("<cpu mode='host-passthrough'/>", "host-passthrough"),
        ("<cpu mode='host-model'/>", "host-model"),
        ("<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>", "qemu64"),
        ("<cpu><model>EPYC</model></cpu>", "EPYC"),
    ],
)
def test_a_document_tells_the_cpu(cpu: str, said: str) -> None:
    assert board(document(cpu=cpu))[1] == said
