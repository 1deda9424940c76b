"""A snapshot on this machine without a guest: a layer of RAM, an image of device state, overlays with its tag."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.ram.layers import Writer
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.adapters.snapshots.archives import LocalArchives
from hvctl.model.archive import Hardware
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Process, Region
from hvctl.settings import Settings

UUID = "00000000-0000-0000-0000-000000000001"
FACTS = HostFacts("h", "qemu:///system", 2, 1 << 30, "7.2.22", "9.0", "boot", 1, os.getuid(), os.getgid())
HARDWARE = Hardware("7.2.22", "pc-i440fx-7.2", "tcg", "maximum", "words")
PAGES = 2048
MIB = 1 << 20


def io(image: Path, *commands: str) -> None:
    """What a guest does to a disk, in the words of qemu-io."""
    argv = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *argv, str(image)], check=True, capture_output=True)


@dataclass(frozen=True)
class ArchiveLab:
    """snapshot is at 2 in its overlays, whose guest has gone on since."""

    settings: Settings
    archives: LocalArchives
    snapshot: Snapshot
    overlay: Path
    data: Path
    ram: dict[int, bytes]

    @property
    def target(self) -> Path:
        return Path(self.settings.state_dir).parent / "saved"


def lay(root: Path) -> ArchiveLab:
    settings = Settings(state_dir=str(root / "state"), ram_dir=str(root / "ram"), memory_margin=0)
    archives = LocalArchives(settings, FACTS)
    disks = settings.vms_dir / UUID
    for folder in (disks, settings.images_dir):
        folder.mkdir(parents=True, mode=0o711)
    base = settings.images_dir / "root.qcow2"
    qemuimg.create_empty(base, 16 * MIB)
    io(base, "write -P 1 0 4M")
    identity = "11111111-2222-3333-4444-555555555555"
    overlay, data = disks / "root.qcow2", disks / "data.qcow2"
    qemuimg.create_overlay(overlay, base, "qcow2")
    qemuimg.create_empty(data, 8 * MIB)
    tag = f"hvctl-{identity}"
    for disk in (overlay, data):
        io(disk, "write -P 2 1M 1M")
        subprocess.run(["qemu-img", "snapshot", "-c", tag, str(disk)], check=True)
        io(disk, "write -P 3 1M 2M")
    facts = [
        ["node", "n0", "qcow2", "rw", str(overlay), str(base)],
        ["node", "n1", "qcow2", "rw", str(data)],
        ["node", "n2", "qcow2", "ro", str(base)],
        ["disk", "virtio-disk0", "n0", str(16 * MIB)],
        ["disk", "virtio-disk1", "n1", str(8 * MIB)],
    ]
    snapshot = Snapshot(
        id=identity,
        name="s",
        vm_uuid=UUID,
        created_at="2026-01-01T00:00:00Z",
        binding=Binding(Process(7, 8, "boot"), ("vcpu 0",), tuple(sorted(map(shlex.join, facts)))),
        tag=tag,
        targets={"vda": "n0", "vdb": "n1"},
        vmstate_node=f"hvctl-{identity[:8]}",
        folder=str(settings.snapshots_dir / UUID / identity),
        regions=(Region("pc.ram", "/r", PAGES * PAGE),),
        balloon=PAGES * PAGE,
        vcpus=1,
        stored=0,
    )
    return ArchiveLab(settings, archives, snapshot, overlay, data, _fill(settings, snapshot))


def _fill(settings: Settings, snapshot: Snapshot) -> dict[int, bytes]:
    """RAM and device state into the snapshot's folder; the pages that hold anything."""
    folder = Path(snapshot.folder)
    snapshotfolder.make(settings.snapshots_dir, folder)
    ram = {n: bytes([n % 251 + 1]) * PAGE for n in range(3, PAGES, 3)}
    numbers = np.array(sorted(ram), np.int64)
    content = np.frombuffer(b"".join(ram[n] for n in sorted(ram)), np.uint8).copy()
    writer = Writer(folder, PAGES, base=False, limit=1 << 40)
    writer.put(numbers, content.ctypes.data + np.arange(numbers.size, dtype=np.int64) * PAGE)
    writer.finish()
    writer.close()
    state = folder / snapshotfolder.VMSTATE
    qemuimg.create_empty(state, MIB)
    io(state, "write -P 9 0 64k")
    subprocess.run(["qemu-img", "snapshot", "-c", snapshot.tag, str(state)], check=True)
    snapshotfolder.publish(folder, snapshot)
    return ram
