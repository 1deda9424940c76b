"""What tests of a reset of one disk need around it: a guest with two disks, whole snapshots, and a caller that dies.

Whole snapshots are made here by the monitor alone, so that what is tested does not rest on hvctl's own way of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvctl.adapters.disks import diskseat, diskspare
from hvctl.adapters.disks.diskseat import Seat
from hvctl.adapters.disks.diskspare import Plan
from hvctl.adapters.disks.diskswap import Swapped, restore_disk
from hvctl.adapters.guest import agent
from hvctl.adapters.qemu import qemuimg
from hvctl.adapters.qemu.qmp import Qmp
from hvctl.model.vm import Disk, DiskSpec, Vm, VmSpec
from tests.contract.outside import MIB
from tests.contract.real import RealOutside
from tests.host import connection
from tests.host.outside import patient

SIZE = 16 * MIB  # small: the guest is emulated, and reads and sums all of it often
SECONDS = 60.0
AGENT_SECONDS = 60.0
BLOCK = 1 << 20


def two_disks(spec: VmSpec) -> VmSpec:
    extra = DiskSpec("extra", "vdb", str(Path(spec.folder, "extra.qcow2")), SIZE)
    small = 128 * MIB
    return replace(spec, memory=small, max_memory=small, max_vcpus=1, disks=(*spec.disks, extra))


def images(spec: VmSpec) -> Path:
    """Where a disk's base image may lie: the folder of images beside that of VMs."""
    return Path(spec.folder).parent.parent / "images"


def virsh(*argv: str) -> str:
    done = subprocess.run(["virsh", *argv], check=False, capture_output=True, text=True)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


@dataclass
class Guest:
    """A running VM of two disks; snapshots are tags with their RAM."""

    outside: RealOutside
    uuid: str
    tags: list[str] = field(default_factory=list)

    @property
    def vm(self) -> Vm:
        return self.outside.host.domains.get(self.uuid)

    @property
    def pid(self) -> int:
        process = self.vm.process
        assert process is not None
        return process.pid

    def disk(self, target: str = "vdb") -> Disk:
        return next(d for d in self.vm.disks if d.target == target)

    def overlay(self, target: str = "vdb") -> Path:
        return Path(str(self.disk(target).path))

    # --- inside

    def call(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        # An emulated guest on a busy machine is slow, and that is no verdict.
        return patient(
            lambda: self.outside.host.domains.agent(self.uuid, command, arguments, max(seconds, AGENT_SECONDS))
        )

    def sh(self, script: str) -> str:
        done = agent.run(self.call, ["/bin/sh", "-ec", script], seconds=AGENT_SECONDS)
        assert done.status == 0, (script, done.stdout, done.stderr)
        return done.stdout.decode()

    def digest(self, device: str = "/dev/vdb") -> str:
        """Of the whole disk as the guest reads it, not as it remembers it."""
        return self.sh(f"blockdev --flushbufs {device}; sha256sum < {device}").split()[0]

    # --- the monitor

    @contextmanager
    def monitor(self) -> Iterator[Qmp]:
        with Qmp(str(self.vm.monitor), SECONDS, self.pid) as qmp:
            yield qmp

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Through libvirt, which is not how hvctl asks."""
        done = connection.monitor(self.uuid, json.dumps({"execute": command, "arguments": arguments or {}}))
        answer = json.loads(done)
        assert "error" not in answer, answer
        return answer["return"]

    def nodes(self) -> dict[str, Any]:
        return {n["node-name"]: n for n in self.ask("query-named-block-nodes", {"flat": True})}

    def devices(self) -> dict[str, str]:
        return {b["qdev"]: b["inserted"]["node-name"] for b in self.ask("query-block") if "inserted" in b}

    def status(self) -> str:
        return str(self.ask("query-status")["status"])

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def files(self) -> list[str]:
        return sorted(p.name for p in self.overlay().parent.iterdir())

    # --- whole snapshots

    def take(self, tag: str) -> None:
        self.tags.append(tag)
        vmstate = self._place(f"{tag}.vmstate")
        qemuimg.create_empty(vmstate, MIB)
        os.chown(vmstate, *self._owner())
        file = {"driver": "file", "filename": str(vmstate)}
        with self.paused(), self.monitor() as qmp:
            qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": f"state-{tag}", "file": file})
            self._job(qmp, "snapshot-save", tag)
            self._copy_ram(self._ram(), self._place(f"{tag}.ram"))

    def reset_all(self, tag: str) -> None:
        with self.paused(), self.monitor() as qmp:
            for step in range(2):
                # A load reads the rings out of RAM, and writes some RAM of its own.
                self._copy_ram(self._place(f"{tag}.ram"), self._ram())
                if step == 0:
                    self._job(qmp, "snapshot-load", tag)
        self.outside.await_guest(self.uuid)

    def delete(self, tag: str) -> None:
        self.tags.remove(tag)
        with self.monitor() as qmp:
            held = [n for n, node in self.nodes().items() if f"'{tag}'" in str(node["image"].get("snapshots"))]
            qmp.job("snapshot-delete", {"tag": tag, "devices": held}, SECONDS)
            qmp.dismiss_jobs()
            qmp.execute("blockdev-del", {"node-name": f"state-{tag}"})
        for kind in ("ram", "vmstate"):
            self._place(f"{tag}.{kind}").unlink(missing_ok=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.outside.host.domains.pause(self.uuid)
        try:
            yield
        finally:
            self.outside.host.domains.resume(self.uuid)

    def _job(self, qmp: Qmp, job: Any, tag: str) -> None:
        def shared(on: bool) -> dict[str, Any]:
            return {"capabilities": [{"capability": "x-ignore-shared", "state": on}]}

        qmp.execute("migrate-set-capabilities", shared(True))
        node = f"state-{tag}"
        qmp.job(job, {"tag": tag, "vmstate": node, "devices": [node, *self._formats()]}, SECONDS)
        qmp.dismiss_jobs()
        qmp.execute("migrate-set-capabilities", shared(False))

    def _formats(self) -> list[str]:
        return sorted(self.devices().values())

    def _ram(self) -> Path:
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        (path,) = {line.split(maxsplit=5)[5] for line in maps if " rw-s " in line and "/guests/" in line}
        return Path(path)

    def _copy_ram(self, source: Path, target: Path) -> None:
        with source.open("rb") as old, target.open("r+b" if target.exists() else "w+b") as new:
            while piece := old.read(BLOCK):
                new.write(piece)

    def _place(self, name: str) -> Path:
        """Beside the overlays, since the VM's folder goes with it."""
        return self.overlay("vda").parent / name

    def _owner(self) -> tuple[int, int]:
        status = self.overlay("vda").stat()
        return status.st_uid, status.st_gid

    # --- what is tested

    def seat(self, qmp: Qmp, target: str = "vdb") -> Seat:
        process = self.vm.process
        assert process is not None
        seen = diskseat.sight(qmp.execute_all(diskseat.QUESTIONS))
        return diskseat.find(seen, process, self.disk(target), connection.xml(self.uuid))

    def prepare(self, tag: str, extent: tuple[int, int] | None = None, target: str = "vdb") -> Plan:
        with self.monitor() as qmp:
            folders = [self.overlay(target).parent.parent.parent / "images"]
            return diskspare.prepare(qmp, self.seat(qmp, target), tag, extent, folders)

    def restore(self, plan: Plan) -> Swapped:
        with self.monitor() as qmp:
            return restore_disk(qmp, plan)

    def back(self, tag: str, extent: tuple[int, int] | None = None) -> Swapped:
        return self.restore(self.prepare(tag, extent))


def content(image: Path, scratch: Path, tag: str | None = None) -> str:
    """Digest of what a guest reads from a qcow2 image, or from one of its snapshots; not by hvctl's own calls."""
    snapshot = [] if tag is None else ["-l", f"snapshot.name={tag}"]
    argv = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", *snapshot, str(image), str(scratch)]
    subprocess.run(argv, check=True)
    with scratch.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def die_at(guest: Guest, step: str) -> bool:
    """Have another process begin what is prepared and be killed before `step`; whether it got there."""
    argv = [sys.executable, "-m", "tests.host.diskpart", str(guest.vm.monitor), str(guest.pid)]
    done = subprocess.run([*argv, str(guest.overlay()), step], check=False)
    assert done.returncode in (0, -signal.SIGKILL), done
    return done.returncode != 0


def _main(monitor: str, pid: str, overlay: str, step: str) -> None:
    def at(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    plan = diskspare.prepared(Path(overlay))
    assert plan is not None
    with Qmp(monitor, SECONDS, int(pid)) as qmp:
        restore_disk(qmp, plan, at=at)


if __name__ == "__main__":
    _main(*sys.argv[1:])
