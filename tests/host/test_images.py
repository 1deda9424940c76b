"""The guest images, built and booted: what a VM of each does by itself, seen from the host and through the agent."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from host import connection
from hvctl.adapters.disks.storage import FolderStorage
from hvctl.adapters.images import imagebuild
from hvctl.model.host import HostFacts
from hvctl.model.image import Image
from hvctl.model.vm import Accel, DiskSpec, VmSpec
from hvctl.settings import Settings

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

MIB = 1 << 20
BOOT_DEADLINE = 120.0


def virsh(*arguments: str, text: str | None = None) -> str:
    argv = ["virsh", *arguments]
    return subprocess.run(argv, input=text, check=True, capture_output=True, text=True).stdout


def eventually(what: Callable[[], Any], seconds: float = BOOT_DEADLINE) -> Any:
    """What `what` returns as soon as that is true; the guest tells of itself only when it is asked."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := what():
                return found
        except AssertionError:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


@dataclass(frozen=True)
class Guest:
    uuid: str
    console: Path

    def agent(self, command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(connection.agent(self.uuid, request, 30))["return"]

    def run(self, *argv: str, given: bytes = b"") -> tuple[int, str]:
        """Exit status and output of a program in the guest."""
        asked = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        pid = self.agent("guest-exec", **asked, **{"input-data": base64.b64encode(given).decode()})["pid"]

        def ended() -> Any:
            status = self.agent("guest-exec-status", pid=pid)
            return status if status["exited"] else None

        status = eventually(ended)
        return status["exitcode"], base64.b64decode(status.get("out-data", "")).decode()

    def boots(self) -> int:
        return self.console.read_text(errors="replace").count("hvctl-ready")

    def wait_ready(self, boots: int = 1) -> None:
        eventually(lambda: self.boots() >= boots)
        eventually(lambda: self.agent("guest-ping") == {})


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """A state folder of our own that QEMU's user may pass through, with the images of this machine in it."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="hvctl-test-"))
    folder.chmod(0o711)
    images = Settings().images_dir
    images.mkdir(parents=True, exist_ok=True)
    (folder / "images").symlink_to(images)
    yield Settings(state_dir=str(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["micro", "debian"])
def image(request: pytest.FixtureRequest, scrubbed_environment: None) -> Iterator[Image]:
    built = imagebuild.build(Settings(), request.param, lambda _: None)
    yield built
    # libvirt gives the files of these plain domains to QEMU's user; those of hvctl's own VMs it may not touch.
    for file in Path(built.kernel).parent.iterdir():
        os.chown(file, 0, 0)


@pytest.fixture(scope="module")
def guest(image: Image, settings: Settings) -> Iterator[Guest]:
    identity = str(uuid.uuid4())
    folder = settings.vms_dir / identity
    disks = [DiskSpec("data", "vda", str(folder / "data.qcow2"), 64 * MIB)]
    if image.root and image.root_size:
        root = DiskSpec("root", "vdb", str(folder / "root.qcow2"), image.root_size, image.root, image.root_format)
        disks.append(root)
    spec = VmSpec(
        uuid=identity,
        name=f"image-{identity[:8]}",
        image=image.name,
        accel=Accel.TCG,
        vcpus=1,
        max_vcpus=3,
        memory=image.min_memory,
        max_memory=image.min_memory,
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.cmdline,
        folder=str(folder),
        monitor=str(folder / "qmp" / "monitor.sock"),
        disks=tuple(disks),
    )
    storage = FolderStorage(settings, HostFacts("h", "", 1, 1, "", "", "", 1, os.getuid(), os.getgid()))
    storage.make_disks(spec)
    console = folder / "console"
    console.touch()
    console.chmod(0o666)
    try:
        virsh("create", "/dev/stdin", text=domain(spec, console))
        try:
            booted = Guest(identity, console)
            booted.wait_ready()
            yield booted
        finally:
            if virsh("list", "--uuid").find(identity) >= 0:
                virsh("destroy", identity)
    finally:
        storage.remove(identity)


def domain(spec: VmSpec, console: Path) -> str:
    disks = "".join(
        f"""<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{escape(disk.path)}'/>
        <target dev='{disk.target}' bus='virtio'/><serial>{disk.name}</serial></disk>"""
        for disk in spec.disks
    )
    return f"""
    <domain type='qemu'>
      <name>{spec.name}</name><uuid>{spec.uuid}</uuid>
      <memory unit='b'>{spec.memory}</memory><vcpu current='{spec.vcpus}'>{spec.max_vcpus}</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{spec.kernel}</kernel><initrd>{spec.initrd}</initrd>
        <cmdline>{escape(spec.cmdline)}</cmdline></os>
      <features><acpi/></features><on_reboot>restart</on_reboot>
      <devices>
        {disks}
        <controller type='usb' model='none'/>
        <serial type='file'><source path='{escape(str(console))}' append='on'/></serial>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
      </devices>
    </domain>"""


def test_it_boots_with_the_least_memory_and_its_agent_answers(guest: Guest) -> None:
    commands = {c["name"] for c in guest.agent("guest-info")["supported_commands"] if c["enabled"]}
    wanted = {"guest-exec", "guest-set-vcpus", "guest-get-vcpus", "guest-set-time", "guest-sync-delimited"}
    assert wanted <= commands


def test_programs_run_with_status_and_input(guest: Guest) -> None:
    assert guest.run("sh", "-c", "read word; echo got $word; exit 7", given=b"it\n") == (7, "got it\n")


def test_the_blank_data_disk_is_formatted_and_mounted(guest: Guest) -> None:
    status, mounts = guest.run("grep", " /data ext4 rw", "/proc/mounts")
    assert (status, len(mounts.splitlines())) == (0, 1)


def test_a_vcpu_comes_online_by_itself_and_stays_offline_when_told(guest: Guest) -> None:
    online = "/sys/devices/system/cpu/online"
    virsh("setvcpus", guest.uuid, "2", "--live")
    eventually(lambda: guest.run("cat", online) == (0, "0-1\n"))
    assert guest.agent("guest-set-vcpus", vcpus=[{"logical-id": 1, "online": False}]) == 1
    # The guest handles events in order: when the third is online, the event of the second's end was handled.
    virsh("setvcpus", guest.uuid, "3", "--live")
    eventually(lambda: guest.run("cat", online) == (0, "0,2\n"))


def test_the_clock_is_set(guest: Guest) -> None:
    guest.agent("guest-set-time", time=1_900_000_000 * 10**9)
    status, now = guest.run("date", "+%s")
    assert status == 0
    assert 1_900_000_000 <= int(now) < 1_900_000_600
    guest.agent("guest-set-time", time=int(time.time()) * 10**9)


def test_the_random_generator_is_reseeded(guest: Guest) -> None:
    assert guest.run("/usr/libexec/hvctl-reseed", given=os.urandom(64)) == (0, "")
    assert guest.run("/usr/libexec/hvctl-reseed", given=b"too short") == (1, "")


def test_data_survives_a_reboot_by_the_agent(guest: Guest) -> None:
    assert guest.run("sh", "-c", "echo kept > /data/file && sync")[0] == 0
    before = guest.boots()
    virsh("reboot", guest.uuid, "--mode", "agent")
    guest.wait_ready(before + 1)
    assert guest.run("cat", "/data/file") == (0, "kept\n")


def test_a_disk_that_is_not_blank_is_left_alone(guest: Guest) -> None:
    """Run after the reboot: the file system's identity is as at the first boot, so it was not made again."""
    label = guest.run("sh", "-c", "dd if=/dev/vda bs=1 skip=1144 count=4 2>/dev/null")
    assert label == (0, "data")
    assert guest.run("test", "-e", "/data/file")[0] == 0


def test_the_power_button_powers_off(guest: Guest) -> None:
    """Last: the domain is transient and gone after it."""
    virsh("shutdown", guest.uuid, "--mode", "acpi")
    eventually(lambda: guest.uuid not in virsh("list", "--uuid"))
