"""A VM as libvirt, its guest and the kernel show it: nothing here asks hvctl, so its claims can be checked."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

from hvctl.errors import HvctlError

from . import connection

T = TypeVar("T")

KIB = 1 << 10
MIB = 1 << 20
SECONDS = 60.0
RAM_MARK = "/run/mark"
DISK_MARK = "/data/mark"
# What libvirt says of an agent whose channel it has closed.
_GONE = ("agent is not connected", "agent disappeared")


def virsh(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["virsh", "-c", "qemu:///system", *argv], input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def await_true(holds: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def patient(ask: Callable[[], T]) -> T:
    """An answer of a guest's agent, asked for again while libvirt has its channel for closed: QEMU tells of a port's
    state once a second at most, so after a reset libvirt may close it although the agent has answered since."""
    until = time.monotonic() + SECONDS
    while True:
        try:
            return ask()
        except (AssertionError, HvctlError) as e:
            if not any(gone in str(e) for gone in _GONE) or time.monotonic() >= until:
                raise
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Guest:
    """One domain, seen from outside of hvctl."""

    name: str
    uuid: str

    # --- libvirt

    @property
    def state(self) -> str:
        return connection.state(self.uuid)

    def xml(self, *, inactive: bool = False) -> ElementTree.Element:
        return ElementTree.fromstring(connection.xml(self.uuid, inactive=inactive))

    @property
    def tap(self) -> str:
        target = self.xml().find("devices/interface/target")
        assert target is not None
        return target.get("dev", "")

    def vcpus(self, *flags: str) -> int:
        return int(virsh("vcpucount", self.uuid, *flags))

    def memory(self, flag: str = "--live") -> int:
        """Bytes: the balloon of the running guest, or what the definition says."""
        if flag == "--live":
            return connection.balloon(self.uuid)["actual"] * KIB
        return int(self.xml(inactive=True).findtext("currentMemory", "0")) * KIB

    def stats(self, *command: str) -> dict[str, str]:
        """Lines of two columns of a virsh command on this domain, such as `blkdeviotune vda`."""
        verb, *rest = command
        lines = (line.replace(":", " ").split() for line in virsh(verb, self.uuid, *rest).splitlines())
        return {parts[0]: parts[1] for parts in lines if len(parts) == 2}

    def await_report(self) -> None:
        """Until the guest has told of its memory as it is after this call, and not in the middle of a change."""
        asked = time.time()
        await_true(lambda: connection.balloon(self.uuid)["last_update"] > asked, f"{self.name} reports its memory")

    def overlays(self) -> list[Path]:
        sources = self.xml(inactive=True).findall("devices/disk/source")
        return [Path(source.get("file", "")) for source in sources]

    # --- QEMU

    @property
    def pid(self) -> int:
        return int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def qmp(self, command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(connection.monitor(self.uuid, request))["return"]

    def nodes(self) -> list[str]:
        """Named nodes that hvctl added, of which each snapshot has one."""
        return sorted(n["node-name"] for n in self.qmp("query-named-block-nodes") if "hvctl" in n["node-name"])

    def tags(self) -> list[str]:
        """Internal snapshots in the disks of the running VM."""
        inserted = (device.get("inserted", {}).get("image", {}) for device in self.qmp("query-block"))
        return sorted({s["name"] for image in inserted for s in image.get("snapshots", ())})

    def stored_tags(self) -> list[str]:
        """Internal snapshots in the overlays of a VM that is off."""
        command = ("qemu-img", "info", "-U", "-f", "qcow2", "--output", "json")
        answers = (json.loads(subprocess.check_output([*command, str(path)])) for path in self.overlays())
        return sorted(s["name"] for answer in answers for s in answer.get("snapshots", ()))

    # --- the guest

    def _agent(self, command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(connection.agent(self.uuid, request, 10))["return"]

    def _ask(self, command: str, **arguments: Any) -> Any:
        return patient(lambda: self._agent(command, **arguments))

    def answers(self) -> bool:
        try:
            return self._agent("guest-ping") == {}
        except AssertionError:
            return False

    def await_answer(self) -> None:
        await_true(self.answers, f"the agent of {self.name} answers")

    def await_boot(self) -> None:
        """Until the agent answers, the balloon, which starts empty, has its size, and the disk is mounted."""
        self.await_answer()
        await_true(lambda: self.memory() == self.memory("--config"), f"the balloon of {self.name} has its size")
        self.run('until grep -q " /data " /proc/mounts || ! [ -e /dev/vda ]; do sleep 0.1; done')

    def run(self, script: str) -> str:
        """What a shell script prints in the guest; it has to succeed, and may run twice."""
        command = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = self._ask("guest-exec", **command)["pid"]
        status: dict[str, Any] = {}

        def exited() -> bool:
            status.update(self._ask("guest-exec-status", pid=pid))
            return bool(status["exited"])

        await_true(exited, f"the guest ends {script!r}")
        assert status["exitcode"] == 0, base64.b64decode(str(status.get("err-data", "")))
        return base64.b64decode(str(status.get("out-data", ""))).decode()

    def online(self) -> int:
        return int(self.run("grep -c ^processor /proc/cpuinfo"))

    def mem_total(self) -> int:
        """Bytes, as the guest's kernel counts what it has."""
        return int(self.run("awk '/^MemTotal:/ {print $2}' /proc/meminfo")) * KIB

    def mark(self, text: str) -> None:
        """Write the same into RAM and onto the disk."""
        self.run(f"for f in {RAM_MARK} {DISK_MARK}; do echo {text} > $f; done; sync")

    def marks(self) -> tuple[str, str]:
        """What RAM and the disk hold; the disk's is read from the disk and not from the guest's cache."""
        ram, disk = self.run(f"sync; echo 3 > /proc/sys/vm/drop_caches; cat {RAM_MARK} {DISK_MARK}").split()
        return ram, disk

    # --- the host's kernel

    def cpu(self) -> tuple[int, int | None]:
        """The weight (100 is the default) and the quota in percent that the kernel has for the whole VM."""
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            # libvirt puts QEMU's main thread into a group below that of the VM.
            group = Path("/sys/fs/cgroup") / path.lstrip("/")
            if "cpu" in controllers.split(","):
                group = Path("/sys/fs/cgroup/cpu", path.lstrip("/").removesuffix("/emulator"))
                quota = int((group / "cpu.cfs_quota_us").read_text())
                period = int((group / "cpu.cfs_period_us").read_text())
                weight = round(int((group / "cpu.shares").read_text()) * 100 / 1024)
                return weight, None if quota < 0 else quota * 100 // period
            group = group.parent
            if not controllers and (group / "cpu.max").exists():
                most, each = (group / "cpu.max").read_text().split()
                return int((group / "cpu.weight").read_text()), None if most == "max" else int(most) * 100 // int(each)
        raise AssertionError(f"{self.name} is in no group of the CPU controller")

    def rates(self) -> dict[str, int]:
        """Bits per second that the kernel's tbf allows: `in` on the tap, `out` on the ifb that it is redirected to."""
        found = {}
        devices = [("in", self.tap), *(("out", ifb) for ifb in ifbs(self.uuid))]
        for direction, device in devices:
            for qdisc in json.loads(subprocess.check_output(["tc", "-j", "qdisc", "show", "dev", device])):
                if qdisc["kind"] == "tbf":
                    found[direction] = int(qdisc["options"]["rate"]) * 8
        return found


def ifbs(uuid: str) -> list[str]:
    """Devices whose alias names a VM as hvctl's."""
    links = json.loads(subprocess.check_output(["ip", "-j", "link"]))
    return [link["ifname"] for link in links if uuid in link.get("ifalias", "")]


def domains(prefix: str) -> Iterator[Guest]:
    for name in connection.names():
        if name.startswith(prefix):
            yield Guest(name, connection.uuid(name))
