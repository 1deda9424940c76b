"""What the host tracks of a guest's connections is forgotten, and of nobody else's, whatever the guest claims. On real
flows, in namespaces that the tests make."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from host.namespaces import namespace, run, within
from hvctl.adapters.network import conntrack
from hvctl.adapters.network.traffic import TrafficControl
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Nic

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

HOST, OUTSIDE = ("192.0.2.1", "2001:db8::1"), ("198.51.100.2", "2001:db8:1::2")
FACADE, FAR = "198.51.100.1", "203.0.113.5"


# --- a host with a bridge, and guests on it that are namespaces


@dataclass
class Peer:
    """A namespace at the end of a veth: a guest on the bridge, or somebody on the host's other side."""

    namespace: str
    tap: str
    mac: str
    addresses: tuple[str, ...]
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def nic(self) -> Nic:
        return Nic(self.mac, "virtio", "br0", self.tap)

    def serve(self, address: str) -> tuple[str, int]:
        """A TCP server's address; it never accepts, which its kernel does for it."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = within(self.namespace, lambda: socket.create_server((address, 0), family=family))
        self.sockets.append(server)
        return address, int(server.getsockname()[1])

    def connect(self, where: tuple[str, int]) -> None:
        self.sockets.append(within(self.namespace, lambda: socket.create_connection(where, 10)))

    def take(self, address: str) -> None:
        """Claim an address of somebody else's, and tell all of the bridge."""
        run("ip", "-n", self.namespace, "address", "add", f"{address}/24", "dev", "eth0")

        def shout() -> None:
            mac, packed = bytes.fromhex(self.mac.replace(":", "")), socket.inet_aton(address)
            reply = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + mac + packed + b"\xff" * 6 + packed
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
                wire.bind(("eth0", 0))
                wire.send(b"\xff" * 6 + mac + b"\x08\x06" + reply)

        within(self.namespace, shout)


@dataclass
class Net:
    """The host's namespace with what is around it."""

    host: str
    one: Peer
    two: Peer
    outside: Peer

    @property
    def control(self) -> TrafficControl:
        return TrafficControl(self.host)

    def tracked(self) -> list[frozenset[str]]:
        """The addresses of each connection that the host tracks."""
        table = run("ip", "netns", "exec", self.host, "cat", "/proc/net/nf_conntrack")
        return [frozenset(_addresses(line)) for line in table.splitlines() if " tcp " in line]

    def holding(self, peer: Peer) -> int:
        return sum(bool(set(peer.addresses) & flow) for flow in self.tracked())

    def neighbour(self, address: str) -> str:
        """The MAC that the host has for an address."""
        (found,) = json.loads(run("ip", "-n", self.host, "-j", "neighbour", "show", address))
        return str(found["lladdr"])


def _addresses(line: str) -> Iterator[str]:
    for word in line.split():
        name, _, value = word.partition("=")
        if name in ("src", "dst"):
            family = socket.AF_INET6 if ":" in value else socket.AF_INET
            yield socket.inet_ntop(family, socket.inet_pton(family, value))


@contextmanager
def peer(
    host: str, tap: str, master: str | None, addresses: tuple[str, str], gateways: tuple[str, str]
) -> Iterator[Peer]:
    with namespace() as name:
        run("ip", "-n", host, "link", "add", tap, "type", "veth", "peer", "name", "eth0", "netns", name)
        if master:
            run("ip", "-n", host, "link", "set", tap, "master", master)
        run("ip", "-n", host, "link", "set", tap, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        for address, length in zip(addresses, ("24", "64"), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/{length}", "dev", "eth0", *_nodad(address))
        run("ip", "-n", name, "link", "set", "eth0", "up")
        for gateway in gateways:
            run("ip", "-n", name, "route", "add", "default", "via", gateway)
        (link,) = json.loads(run("ip", "-n", name, "-j", "link", "show", "eth0"))
        made = Peer(name, tap, link["address"], addresses)
        try:
            yield made
        finally:
            for each in made.sockets:
                each.close()


def _nodad(address: str) -> list[str]:
    """IPv6 addresses that can be used at once."""
    return ["nodad"] if ":" in address else []


@pytest.fixture
def net() -> Iterator[Net]:
    """A host that routes between a bridge with two guests and the outside, and translates what comes and goes."""
    with namespace() as host, ExitStack() as made:
        # With a MAC of its own: one that follows its ports forgets its neighbours when it changes.
        run("ip", "-n", host, "link", "add", "br0", "address", "02:00:00:00:00:01", "up", "type", "bridge")
        for address, length in zip(HOST, ("24", "64"), strict=True):
            run("ip", "-n", host, "address", "add", f"{address}/{length}", "dev", "br0", *_nodad(address))
        one, two = (
            made.enter_context(peer(host, f"tap{n}", "br0", (f"192.0.2.{n}0", f"2001:db8::{n}0"), HOST)) for n in (1, 2)
        )
        facade = (FACADE, "2001:db8:1::1")
        outside = made.enter_context(peer(host, "wan", None, OUTSIDE, facade))
        for address, length in zip(facade, ("24", "64"), strict=True):
            run("ip", "-n", host, "address", "add", f"{address}/{length}", "dev", "wan", *_nodad(address))
        inside = ("ip", "netns", "exec", host)
        run(*inside, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        run(*inside, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE")
        forward = ("-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", f"{one.addresses[0]}:80")
        run(*inside, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", FACADE, *forward)
        run(*inside, "ip6tables", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        yield Net(host, one, two, outside)


def busy(net: Net) -> None:
    """Real connections of each guest with the outside and with the host, and one from the outside to the first."""
    for guest in (net.one, net.two):
        for version in (0, 1):
            guest.connect(net.outside.serve(OUTSIDE[version]))
    server = within(net.one.namespace, lambda: socket.create_server((net.one.addresses[0], 80)))
    net.one.sockets.append(server)
    net.outside.connect((FACADE, 80))
    host = Peer(net.host, "", "", HOST)
    for guest in (net.one, net.two):
        host.connect(guest.serve(guest.addresses[0]))
    guest.sockets += host.sockets


def test_connections_of_one_guest_are_forgotten_whoever_began_them_and_however_translated(net: Net) -> None:
    busy(net)
    assert (net.holding(net.one), net.holding(net.two)) == (4, 3)
    told = net.control.forget_flows([net.one.nic], {})
    assert told == Forgotten(4, net.one.addresses)
    assert (net.holding(net.one), net.holding(net.two)) == (0, 3)
    assert net.control.forget_flows([net.one.nic], {}) == Forgotten(0, net.one.addresses)


def test_what_another_answers_for_stays_his_though_the_host_believed_the_guest(net: Net) -> None:
    """The host's own table has been won over; the owner, who still answers, is at another port."""
    busy(net)
    victim = net.two.addresses[0]
    net.one.take(victim)
    # The kernel keeps an entry that it has for a second before it lets another answer change it.
    until = time.monotonic() + 30
    while net.neighbour(victim) != net.one.mac:
        assert time.monotonic() < until
        run("ip", "-n", net.host, "neighbour", "flush", "dev", "br0", "to", victim)
        run("ip", "-n", net.host, "neighbour", "replace", victim, "lladdr", net.one.mac, "dev", "br0", "nud", "stale")
    told = net.control.forget_flows([net.one.nic], {})
    assert told == Forgotten(4, net.one.addresses, (victim,))
    assert net.holding(net.two) == 3


def test_an_ipv6_address_that_another_answers_for_stays_his(net: Net) -> None:
    busy(net)
    victim = net.two.addresses[1]
    run("ip", "-n", net.host, "neighbour", "replace", victim, "lladdr", net.one.mac, "dev", "br0")
    told = net.control.forget_flows([net.one.nic], {})
    assert told == Forgotten(4, net.one.addresses, (victim,))
    assert net.holding(net.two) == 3


def test_a_guest_that_claims_the_whole_world_ends_no_connection_but_its_own(net: Net) -> None:
    busy(net)
    # Somebody behind a router, whose MAC the host never sees.
    run("ip", "-n", net.outside.namespace, "address", "add", f"{FAR}/32", "dev", "lo")
    run("ip", "-n", net.host, "route", "add", FAR, "via", OUTSIDE[0])
    net.two.connect(net.outside.serve(FAR))
    world = [
        FAR,
        *HOST,
        *OUTSIDE,
        FACADE,
        *net.two.addresses,
        "127.0.0.1",
        "0.0.0.0",
        "fe80::1",
        "224.0.0.1",
        "nonsense",
    ]
    for address in (FAR, OUTSIDE[0]):
        run("ip", "-n", net.one.namespace, "address", "add", f"{address}/32", "dev", "eth0")
    before = [f for f in net.tracked() if not set(net.one.addresses) & f]
    told = net.control.forget_flows([net.one.nic], {net.one.mac: world})
    assert (told.deleted, told.addresses) == (4, net.one.addresses)
    assert set(told.disputed) == {FAR, *HOST, *OUTSIDE, FACADE, *net.two.addresses}
    assert net.tracked() == before


def test_an_address_that_the_host_knows_at_two_places_is_nobodys(net: Net) -> None:
    busy(net)
    own = net.one.addresses[0]
    run("ip", "-n", net.host, "neighbour", "add", own, "lladdr", net.two.mac, "dev", "wan")
    told = net.control.forget_flows([net.one.nic], {})
    assert told == Forgotten(1, net.one.addresses[1:], (own,))


def test_an_address_that_the_host_forgot_is_believed_once_the_guest_answers_for_it(net: Net) -> None:
    busy(net)
    run("ip", "-n", net.host, "neighbour", "flush", "dev", "br0")
    # A flush leaves what connections in use have resolved, so only new entries would show what the host knows.
    claims = {net.one.mac: [*net.one.addresses, "192.0.2.99"]}
    told = net.control.forget_flows([net.one.nic], claims)
    assert told == Forgotten(4, net.one.addresses, ("192.0.2.99",))
    assert net.holding(net.one) == 0


def test_a_guest_that_does_not_answer_is_known_by_what_the_host_saw(net: Net) -> None:
    busy(net)
    run("ip", "-n", net.one.namespace, "link", "set", "eth0", "arp", "off")
    assert net.control.forget_flows([net.one.nic], {}) == Forgotten(4, net.one.addresses)


def test_a_second_nic_of_the_same_guest_is_nobody_else(net: Net) -> None:
    """Linux answers for all its addresses at each of its devices."""
    busy(net)
    second = Nic("52:54:00:00:00:03", "virtio", "br0", "tap3")
    inside = ("peer", "name", "eth1", "address", second.mac, "netns", net.one.namespace)
    run("ip", "-n", net.host, "link", "add", "tap3", "type", "veth", *inside)
    run("ip", "-n", net.host, "link", "set", "tap3", "master", "br0", "up")
    run("ip", "-n", net.one.namespace, "link", "set", "eth1", "up")
    assert net.control.forget_flows([net.one.nic], {}).disputed == net.one.addresses[:1]
    told = net.control.forget_flows([net.one.nic, second], {})
    assert (told.addresses, told.disputed) == (net.one.addresses, ())
    assert net.holding(net.one) == 0


@pytest.mark.parametrize(("name", "number"), [("_NETFILTER", 31), ("_GET", (9 << 8) | 1)])
def test_a_kernel_without_connection_tracking_is_told(
    net: Net, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """What this kernel answers for a protocol, and for a part of netfilter, that it does not have."""
    busy(net)
    monkeypatch.setattr(conntrack, name, number)
    told = net.control.forget_flows([net.one.nic], {})
    assert told == Forgotten(None, net.one.addresses)
