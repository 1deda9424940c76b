"""The bandwidth of a real guest: bytes between it and a network namespace, over a bridge that the test makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

from host.namespaces import End, assert_exceeds, assert_settles_at, namespace, run, within
from hvctl.adapters import imagestore
from hvctl.adapters.traffic import TrafficControl
from hvctl.model.allocation import NicLimit
from hvctl.settings import load_settings

pytestmark = pytest.mark.host

CAP = 8_000_000
MAC = "52:54:00:68:76:01"
HOST_ADDRESS = "192.0.2.1"
SETTINGS = load_settings()


@dataclass(frozen=True)
class Guest:
    """A running guest, the tap of its NIC, and the namespace at the other end of its bridge."""

    uuid: str
    tap: str
    namespace: str

    def agent(self, command: str, arguments: dict[str, object]) -> str:
        return run("virsh", "qemu-agent-command", self.uuid, json.dumps({"execute": command, "arguments": arguments}))

    def shell(self, script: str) -> None:
        """Start a shell script in the guest and let it run."""
        self.agent("guest-exec", {"path": "/bin/sh", "arg": ["-c", script]})


@contextmanager
def bridge_to(ns: str) -> Iterator[str]:
    """A bridge in this process's namespace, without an address, that leads to eth0 in another."""
    name, leg = f"hvb{os.getpid()}", f"hvl{os.getpid()}"
    run("ip", "link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", ns)
    try:
        run("ip", "link", "add", name, "type", "bridge")
        for change in ((leg, "master", name), (leg, "up"), (name, "up")):
            run("ip", "link", "set", *change)
        run("ip", "-n", ns, "address", "add", f"{HOST_ADDRESS}/24", "dev", "eth0")
        run("ip", "-n", ns, "link", "set", "eth0", "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        # The other namespace's end goes with it at once; left to the end of that namespace, it would go later.
        run("ip", "link", "del", leg)


@contextmanager
def dhcp_server(ns: str) -> Iterator[subprocess.Popen[str]]:
    """dnsmasq inside a namespace; its log is on stderr."""
    command = (
        *("ip", "netns", "exec", ns, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file"),
        *("--port=0", "--interface=eth0", "--dhcp-range=192.0.2.10,192.0.2.20", "--leasefile-ro", "--user=root"),
        *("--log-facility=-", "--log-dhcp"),
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.terminate()


def wait_for_lease(server: subprocess.Popen[str]) -> None:
    assert server.stderr
    for line in server.stderr:
        if "DHCPACK" in line:
            return
    raise AssertionError("the DHCP server ended")


@contextmanager
def running_guest(bridge: str) -> Iterator[tuple[str, str]]:
    """The uuid of a micro guest with a NIC on a bridge, and its tap. The one place that knows how a VM is made."""
    image = imagestore.find(SETTINGS, "micro")
    identity = str(uuid.uuid4())
    xml = f"""
    <domain type='qemu'>
      <name>bandwidth-{identity[:8]}</name><uuid>{identity}</uuid>
      <memory unit='MiB'>192</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type>
        <kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd><cmdline>{image.cmdline}</cmdline></os>
      <features><acpi/></features>
      <devices>
        <controller type='usb' model='none'/><memballoon model='none'/><serial type='pty'/>
        <interface type='bridge'><mac address='{MAC}'/><source bridge='{bridge}'/><model type='virtio'/></interface>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
      </devices>
    </domain>"""
    try:
        subprocess.run(["virsh", "create", "/dev/stdin"], input=xml, text=True, check=True, capture_output=True)
        listed = run("virsh", "domiflist", identity)
        yield identity, next(line.split()[0] for line in listed.splitlines() if MAC in line)
    finally:
        subprocess.run(["virsh", "destroy", identity], check=False, capture_output=True)


def wait_for_agent(guest: Guest, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            guest.agent("guest-ping", {})
            return
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def guest_with_nic(scrubbed_environment: None) -> Iterator[Guest]:
    with namespace() as ns, bridge_to(ns) as bridge, dhcp_server(ns) as server, running_guest(bridge) as (vm, tap):
        guest = Guest(vm, tap, ns)
        wait_for_lease(server)
        wait_for_agent(guest)
        yield guest


@pytest.fixture
def control(guest_with_nic: Guest) -> Iterator[TrafficControl]:
    control = TrafficControl()
    yield control
    control.clear(guest_with_nic.uuid)
    assert control.foreign(guest_with_nic.tap) is None
    assert guest_with_nic.uuid not in control.owners()


@contextmanager
def stream_with(guest: Guest, sends: bool) -> Iterator[End]:
    """The namespace's end of a full TCP stream to or from the guest. The guest opens it either way: nobody has to wait
    for a port of the guest's."""
    files = "< /dev/null > /dev/null" if sends else "< /dev/zero > /dev/null"
    with closing(within(guest.namespace, lambda: socket.create_server((HOST_ADDRESS, 0)))) as server:
        server.settimeout(60)
        guest.shell(f"exec nc {HOST_ADDRESS} {server.getsockname()[1]} {files} 2>&1")
        stream, _ = server.accept()
    stream.settimeout(None)
    with closing(End(stream, sends)) as end:
        yield end


@pytest.mark.timeout(300)
@pytest.mark.parametrize("to_guest", [True, False], ids=["inbound", "outbound"])
def test_a_guest_gets_its_cap_and_not_more(guest_with_nic: Guest, control: TrafficControl, to_guest: bool) -> None:
    guest = guest_with_nic
    limit = NicLimit(MAC, CAP, None) if to_guest else NicLimit(MAC, None, CAP)
    with stream_with(guest, sends=to_guest) as end:
        assert_exceeds(3 * CAP, end)
        control.set_limit(guest.tap, limit, guest.uuid)
        assert_settles_at(CAP, end)
        control.set_limit(guest.tap, NicLimit(MAC), guest.uuid)
        assert_exceeds(3 * CAP, end)


@pytest.mark.timeout(300)
def test_the_two_directions_have_caps_of_their_own(guest_with_nic: Guest, control: TrafficControl) -> None:
    guest = guest_with_nic
    with stream_with(guest, sends=True) as arriving, stream_with(guest, sends=False) as leaving:
        control.set_limit(guest.tap, NicLimit(MAC, CAP // 2, CAP), guest.uuid)
        assert_settles_at(CAP // 2, arriving)
        assert_settles_at(CAP, leaving)


def test_libvirts_own_qdisc_is_not_foreign_and_comes_back(guest_with_nic: Guest, control: TrafficControl) -> None:
    def root() -> str:
        shown = json.loads(run("tc", "-j", "qdisc", "show", "dev", guest_with_nic.tap))
        return " ".join(q["kind"] for q in shown)

    assert root() == "noqueue"
    assert control.foreign(guest_with_nic.tap) is None
    control.set_limit(guest_with_nic.tap, NicLimit(MAC, CAP, CAP), guest_with_nic.uuid)
    assert root() == "tbf ingress"
    control.set_limit(guest_with_nic.tap, NicLimit(MAC), guest_with_nic.uuid)
    assert root() == "noqueue"
