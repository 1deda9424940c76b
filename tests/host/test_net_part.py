"""A guest's network made anew: what waits for it is dropped, what the host tracks of its connections is forgotten and
nobody else's, its limit is never out of force meanwhile. In namespaces that the tests make, and with a real guest."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from host.namespaces import dump, namespace, qdiscs, run, within
from host.outside import virsh
from host.site import Site
from host.test_bandwidth import bridge_to, dhcp_server, running_guest, wait_for_lease
from host.test_netlink import without_numbers
from host.tuns import Tun
from hvctl.adapters import conntrack, netlink
from hvctl.adapters.shaping import ifb_name
from hvctl.adapters.traffic import TrafficControl
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.allocation import NicLimit
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Nic

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

VM = "11111111-1111-4111-8111-111111111111"
MBIT = 1_000_000
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


# --- the queue


@contextmanager
def tap_with_guest() -> Iterator[tuple[str, Tun]]:
    """A namespace with tap0, and the end that its guest has."""
    with namespace() as ns:
        run("ip", "-n", ns, "tuntap", "add", "tap0", "mode", "tap")
        run("ip", "-n", ns, "link", "set", "tap0", "up")
        with closing(Tun(ns, "tap0")) as tun:
            yield ns, tun


def length(ns: str) -> int:
    (link,) = json.loads(run("ip", "-n", ns, "-j", "link", "show", "tap0"))
    return int(link.get("txqlen", 0))


def test_a_full_queue_is_dropped_and_is_as_long_as_before() -> None:
    with tap_with_guest() as (ns, tun):
        run("ip", "-n", ns, "link", "set", "tap0", "txqueuelen", "321")
        tun.arrive(range(1000))
        TrafficControl(ns).drop_queue("tap0")
        assert length(ns) == 321
        tun.arrive([7])
        assert tun.take() == [7]
        tun.arrive(range(1000))
        assert len(tun.take()) > 300


def test_what_shapes_the_tap_is_emptied_and_stays_whoever_put_it_there() -> None:
    bucket = ("tbf", "rate", "8kbit", "burst", "2kb", "limit", "60kb")
    with tap_with_guest() as (ns, tun):
        run("tc", "-n", ns, "qdisc", "add", "dev", "tap0", "root", "handle", "1:", "htb", "default", "1")
        run("tc", "-n", ns, "class", "add", "dev", "tap0", "parent", "1:", "classid", "1:1", "htb", "rate", "1gbit")
        run("tc", "-n", ns, "qdisc", "add", "dev", "tap0", "parent", "1:1", "handle", "2:", *bucket)
        before = dump(ns)
        tun.arrive(range(40))
        waiting = max(q["qlen"] for q in qdiscs(ns, "tap0"))
        assert waiting > 30
        assert TrafficControl(ns).drop_queue("tap0") == waiting
        assert max(q["qlen"] for q in qdiscs(ns, "tap0")) == 0
        assert dump(ns) == before
        assert tun.take() == []


def test_a_queue_without_length_is_not_made_longer() -> None:
    with tap_with_guest() as (ns, _):
        run("ip", "-n", ns, "link", "set", "tap0", "txqueuelen", "0")
        with pytest.raises(RefusedError, match="no length"):
            TrafficControl(ns).drop_queue("tap0")
        assert length(ns) == 0


def test_killed_at_any_moment_it_leaves_the_queue_as_long_as_it_was() -> None:
    with tap_with_guest() as (ns, tun):
        for round in range(30):
            child = os.fork()
            if not child:
                control = TrafficControl(ns)
                while True:
                    control.drop_queue("tap0")
            # Each round kills at another point of the child's work; where exactly does not matter.
            time.sleep(0.01 + round * 0.0007)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert length(ns) == 1000
        tun.arrive([1])
        assert tun.take() == [1]


# --- the shaping


def limit(inbound: int | None = None, outbound: int | None = None) -> NicLimit:
    return NicLimit("52:54:00:00:00:01", inbound, outbound)


def test_rebuilt_buckets_are_new_and_as_they_should_be() -> None:
    with tap_with_guest() as (ns, tun):
        control = TrafficControl(ns)
        control.set_limit("tap0", limit(8000, 16 * MBIT), VM)
        whole = dump(ns)
        control.rebuild("tap0", limit(8000, 16 * MBIT), VM)
        control.rebuild("tap0", limit(8000, 16 * MBIT), VM)
        assert dump(ns) == whole
        tun.arrive(range(40))
        altered = ("tbf", "rate", "8kbit", "burst", "3kb", "limit", "64kb")
        run("tc", "-n", ns, "qdisc", "change", "dev", "tap0", "handle", "6876:", "root", *altered)
        run("tc", "-n", ns, "filter", "del", "dev", "tap0", "ingress")
        assert dump(ns) != whole
        control.rebuild("tap0", limit(8000, 16 * MBIT), VM)
        control.rebuild("tap0", limit(8000, 16 * MBIT), VM)
        assert without_numbers(dump(ns)) == without_numbers(whole)
        assert [q["bytes"] for d in ("tap0", ifb_name("tap0")) for q in qdiscs(ns, d) if q["kind"] == "tbf"] == [0, 0]


def test_the_limit_is_in_force_after_each_request_of_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = limit(8 * MBIT, 16 * MBIT)
    with tap_with_guest() as (ns, _):
        control = TrafficControl(ns)
        control.set_limit("tap0", wanted, VM)
        ask, seen = netlink._ask, []

        def looked_after(*args: Any, **kwargs: Any) -> list[Any]:
            answer = ask(*args, **kwargs)
            monkeypatch.setattr(netlink, "_ask", ask)
            seen.append((control.limit("tap0", wanted.mac), control.foreign("tap0")))
            monkeypatch.setattr(netlink, "_ask", looked_after)
            return answer

        monkeypatch.setattr(netlink, "_ask", looked_after)
        control.rebuild("tap0", wanted, VM)
        assert len(seen) > 5
        assert set(seen) == {(wanted, None)}


# --- a real guest


@dataclass(frozen=True)
class Pinged:
    """A running guest on a bridge that leads to a namespace, from which it is asked for echoes."""

    uuid: str
    tap: str
    address: str
    wire: socket.socket

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            body = struct.pack("!BBHHH", 8, 0, 0, 0x6876, number)
            total = sum(struct.unpack("!4H", body))
            total = (total & 0xFFFF) + (total >> 16)
            self.wire.sendto(body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:], (self.address, 0))

    def answered(self, last: int) -> list[int]:
        """The numbers of all echoes up to that of `last`, which is asked for again until it comes."""
        found: list[int] = []
        until = time.monotonic() + 60
        while last not in found:
            assert time.monotonic() < until
            self.ask(last)
            try:
                while last not in found:
                    packet = self.wire.recv(1 << 16)
                    kind, _, _, identity, number = struct.unpack_from("!BBHHH", packet, 20)
                    if (kind, identity) == (0, 0x6876):
                        found.append(number)
            except TimeoutError:
                continue
        return found


@pytest.fixture(scope="module")
def pinged(site: Site) -> Iterator[Pinged]:
    with (
        namespace() as ns,
        bridge_to(ns) as bridge,
        dhcp_server(ns) as server,
        running_guest(site, bridge) as (name, uuid, tap),
        closing(within(ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))) as wire,
    ):
        wait_for_lease(server)
        wire.settimeout(1)
        mac = site.json("vm", "show", name)["nics"][0]["mac"]
        shown = site.guest(name)
        shown.await_answer()
        address = shown.run("ip -4 addr show dev eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'").strip()
        # A paused guest does not tell its MAC.
        run("ip", "-n", ns, "neighbour", "replace", address, "lladdr", mac, "dev", "eth0")
        yield Pinged(uuid, tap, address, wire)


@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "shaped"])
def test_a_guest_does_not_see_what_waited_for_it_while_it_was_paused(pinged: Pinged, shaped: bool) -> None:
    control, wanted = TrafficControl(), limit(8000 if shaped else None)
    control.set_limit(pinged.tap, wanted, pinged.uuid)
    try:
        for dropped in (False, True):
            virsh("suspend", pinged.uuid)
            pinged.ask(*range(1, 101))
            if dropped:
                control.drop_queue(pinged.tap)
                control.rebuild(pinged.tap, wanted, pinged.uuid)
            virsh("resume", pinged.uuid)
            echoes = [n for n in pinged.answered(1000 + dropped) if n <= 100]
            if dropped:
                # QEMU itself takes the first one that comes to a paused guest, and keeps it for the resume.
                assert echoes in ([], [1])
            else:
                assert echoes == list(range(1, 101))
    finally:
        control.set_limit(pinged.tap, limit(), pinged.uuid)


def test_the_queue_of_a_guest_that_runs(pinged: Pinged) -> None:
    for number in range(10):
        TrafficControl().drop_queue(pinged.tap)
        assert 2000 + number in pinged.answered(2000 + number)
    (link,) = json.loads(subprocess.check_output(["ip", "-j", "link", "show", pinged.tap]))
    assert link["txqlen"] == 1000
    with pytest.raises(HvctlError):
        TrafficControl().drop_queue("hvctl-none")
