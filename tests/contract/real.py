"""The rest of the world around a real host: libvirt, QEMU and a guest of the micro image, in folders of its own."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hvctl.adapters.images import imagestore
from hvctl.adapters.kernel import process
from hvctl.engine.runtime import open_host
from hvctl.errors import UnreachableError
from hvctl.model.image import Image
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Accel, DiskSpec, NicSpec, Vm, VmSpec
from hvctl.ports import Host
from hvctl.settings import Settings
from tests.contract.outside import MIB, next_number, numbered_snapshot
from tests.host.outside import patient

GUEST_SECONDS = 60.0
NAMES = f"contract-{os.getpid()}-"
MARKS = {"ram": "/run/mark", "disk": "/data/mark"}


class RealOutside:
    def __init__(self, host: Host, settings: Settings, image: Image, bridge: str) -> None:
        self.host = host
        self._settings = settings
        self._image = image
        self._bridge = bridge

    def spec(self) -> VmSpec:
        id = str(uuid.uuid4())
        folder = self._settings.vms_dir / id
        return VmSpec(
            uuid=id,
            name=f"{NAMES}{next_number()}",
            image=self._image.name,
            accel=Accel.TCG,
            vcpus=1,
            max_vcpus=4,
            memory=256 * MIB,
            max_memory=512 * MIB,
            kernel=self._image.kernel,
            initrd=self._image.initrd,
            cmdline=self._image.cmdline,
            folder=str(folder),
            monitor=str(folder / "qmp" / "monitor.sock"),
            disks=(DiskSpec("data", "vda", str(folder / "data.qcow2"), 64 * MIB),),
            nics=(NicSpec(self._bridge, f"52:54:00:{id[:2]}:{id[2:4]}:{id[4:6]}", f"hvc{id[:8]}"),),
            pulse=str(folder / "pulse"),
        )

    def await_guest(self, vm: str) -> None:
        def answers() -> bool:
            try:
                return self.host.domains.agent(vm, "guest-ping", {}, 2.0) == {}
            except UnreachableError:
                return False

        await_true(answers, "the guest agent answers")

    def await_vcpus(self, vm: str, count: int) -> None:
        await_true(lambda: self._run(vm, "nproc").strip() == str(count), f"the guest has {count} vCPUs online")

    def spoil(self, vm: str) -> None:
        self._run(vm, f"for f in {' '.join(MARKS.values())}; do echo {uuid.uuid4()} > $f; done; sync")

    def content(self, vm: str) -> Mapping[str, str]:
        """The disk's mark is read from the disk, not from the guest's cache."""
        self._run(vm, "sync; echo 3 > /proc/sys/vm/drop_caches")
        return {part: self._run(vm, f"cat {path}") for part, path in MARKS.items()}

    def acknowledge(self, vm: str, notice: str) -> None:
        self._run(vm, f"hvctl-ready {notice}")

    def kill(self, vm: Vm) -> None:
        assert vm.process is not None
        os.kill(vm.process.pid, signal.SIGKILL)
        await_true(lambda: not self.host.domains.get(vm.uuid).state.active, "libvirt sees that QEMU is gone")

    def alive(self, vm: Vm) -> bool:
        return vm.process is not None and process.start_time(vm.process.pid) == vm.process.start_time

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def size(self, path: str) -> tuple[int, int]:
        return Path(path).stat().st_ino, Path(path).stat().st_size

    def corrupt(self, path: str) -> None:
        Path(path).write_text("{")

    def remove_archive(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def snapshot(self, vm: Vm, name: str) -> Snapshot:
        return numbered_snapshot(self.host, vm, name, self._settings.snapshots_dir)

    def _run(self, vm: str, script: str) -> str:
        command = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = patient(lambda: self.host.domains.agent(vm, "guest-exec", command, 5.0))["pid"]
        status: dict[str, object] = {}

        def exited() -> bool:
            status.update(patient(lambda: self.host.domains.agent(vm, "guest-exec-status", {"pid": pid}, 5.0)))
            return bool(status["exited"])

        await_true(exited, f"the guest ends {script!r}")
        assert status["exitcode"] == 0, base64.b64decode(str(status.get("err-data", "")))
        return base64.b64decode(str(status.get("out-data", ""))).decode()


def await_true(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + GUEST_SECONDS
    while not holds():
        assert time.monotonic() < until, f"not within {GUEST_SECONDS:g} s: {what}"
        time.sleep(0.05)


@contextmanager
def real_outside() -> Iterator[RealOutside]:
    """Everything it made is gone at the end, and it says so if something is left."""
    with ExitStack() as made:
        settings = Settings(state_dir=_folder(made, "/var/tmp"), ram_dir=_folder(made, "/dev/shm"))
        host = open_host(settings)
        made.callback(host.domains.close)
        made.callback(host.machine.close)
        yield RealOutside(host, settings, imagestore.find(Settings(), "micro"), _bridge(made))
        left = [vm.name for vm in host.domains.list() if vm.name.startswith(NAMES)]
        left += [str(p) for p in settings.snapshots_dir.rglob("*")]
        left += list(host.storage.folders())
        assert left == [], left


def _folder(made: ExitStack, parent: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="hvctl-contract-", dir=parent))
    made.callback(shutil.rmtree, folder)
    folder.chmod(0o711)  # QEMU, another user, passes through
    return str(folder)


def _bridge(made: ExitStack) -> str:
    """One without an address: the guests' packets stay on it."""
    bridge = f"hvcb{os.getpid()}"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    made.callback(subprocess.run, ["ip", "link", "del", bridge], check=True)
    subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
    return bridge
