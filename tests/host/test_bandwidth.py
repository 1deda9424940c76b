"""The bandwidth of a real guest: bytes between it and a network namespace, over a bridge that the test makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

from host.namespaces import End, assert_exceeds, assert_settles_at, namespace, run, within
from host.site import Site
from hvctl.adapters.network.traffic import TrafficControl

pytestmark = pytest.mark.host

CAP = 8_000_000
HOST_ADDRESS = "192.0.2.1"


@dataclass(frozen=True)
class Guest:
    """A running guest, the tap of its NIC, and the namespace at the other end of its bridge."""

    name: str
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
def running_guest(site: Site, bridge: str) -> Iterator[tuple[str, str, str]]:
    """Name, uuid and tap of a micro guest with one NIC, on a bridge."""
    name = site.name()
    site.ok("vm", "create", name, "--image", "micro", "--disk", "none", "--nic", bridge, "--start")
    try:
        shown = site.json("vm", "show", name)
        yield name, shown["uuid"], shown["nics"][0]["tap"]
    finally:
        site.ok("vm", "delete", name, "--force")


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
def guest_with_nic(site: Site) -> Iterator[Guest]:
    with (
        namespace() as ns,
        bridge_to(ns) as bridge,
        dhcp_server(ns) as server,
        running_guest(site, bridge) as (name, uuid, tap),
    ):
        guest = Guest(name, uuid, tap, ns)
        wait_for_lease(server)
        wait_for_agent(guest)
        yield guest


@dataclass(frozen=True)
class Shaper:
    """hvctl's command on the bandwidth of one guest; rates as it takes them."""

    site: Site
    guest: Guest

    def allocate(self, inbound: str, outbound: str) -> None:
        self.site.ok("allocate", self.guest.name, "--net-in", inbound, "--net-out", outbound)


@pytest.fixture
def shaper(site: Site, guest_with_nic: Guest) -> Iterator[Shaper]:
    yield Shaper(site, guest_with_nic)
    site.ok("allocate", guest_with_nic.name, "--net-in", "none", "--net-out", "none")
    control = TrafficControl()
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
def test_a_guest_gets_its_cap_and_not_more(shaper: Shaper, to_guest: bool) -> None:
    with stream_with(shaper.guest, sends=to_guest) as end:
        assert_exceeds(3 * CAP, end)
        shaper.allocate(*("8Mbit", "none") if to_guest else ("none", "8Mbit"))
        assert_settles_at(CAP, end)
        shaper.allocate("none", "none")
        assert_exceeds(3 * CAP, end)


@pytest.mark.timeout(300)
def test_the_two_directions_have_caps_of_their_own(shaper: Shaper) -> None:
    with stream_with(shaper.guest, sends=True) as arriving, stream_with(shaper.guest, sends=False) as leaving:
        shaper.allocate("4Mbit", "8Mbit")
        assert_settles_at(CAP // 2, arriving)
        assert_settles_at(CAP, leaving)


def test_libvirts_own_qdisc_is_not_foreign_and_comes_back(shaper: Shaper) -> None:
    def root() -> str:
        shown = json.loads(run("tc", "-j", "qdisc", "show", "dev", shaper.guest.tap))
        return " ".join(q["kind"] for q in shown)

    assert root() == "noqueue"
    assert TrafficControl().foreign(shaper.guest.tap) is None
    shaper.allocate("8Mbit", "8Mbit")
    assert root() == "tbf ingress"
    shaper.allocate("none", "none")
    assert root() == "noqueue"
