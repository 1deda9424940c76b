"""What waits for a guest is dropped, and its shaping is rebuilt without being out of force: on taps whose guest a test
plays, and with a real guest."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from host.namespaces import dump, namespace, qdiscs, run, within
from host.outside import virsh
from host.site import Site
from host.test_bandwidth import bridge_to, dhcp_server, running_guest, wait_for_lease
from host.test_netlink import without_numbers
from host.tuns import Tun
from hvctl.adapters.network import netlink
from hvctl.adapters.network.shaping import ifb_name
from hvctl.adapters.network.traffic import TrafficControl
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.allocation import NicLimit

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

VM = "11111111-1111-4111-8111-111111111111"
MBIT = 1_000_000


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

        def anew() -> bool:
            """The kernel may say something of its own in between."""
            control.rebuild("tap0", limit(8000, 16 * MBIT), VM)
            both = ("tap0", ifb_name("tap0"))
            return [q["bytes"] for d in both for q in qdiscs(ns, d) if q["kind"] == "tbf"] == [0, 0]

        assert any(anew() for _ in range(5))


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
