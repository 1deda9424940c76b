"""Taps to limit: of the fake host, and of the kernel in a network namespace of their own."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from host.namespaces import run as _run
from host.outside import await_true
from host.tuns import Tun, add_flow

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.adapters.network.traffic import TrafficControl
from hvctl.ports import Network

HOST_ADDRESSES = ("192.0.2.1/24", "2001:db8::1/64")

_numbers = itertools.count()


class Taps(Protocol):
    network: Network

    def add_bridge(self, name: str) -> None: ...

    def add(self, tap: str) -> None: ...

    def remove(self, tap: str) -> None: ...

    def put_foreign(self, tap: str) -> None:
        """Somebody's `htb 1:` as root qdisc."""
        ...

    def wipe(self, tap: str) -> None:
        """Somebody removes every qdisc."""
        ...

    def queue(self, tap: str, packets: int) -> None:
        """Packets of 1000 bytes arrive for a guest that takes none."""
        ...

    def waiting(self, tap: str) -> int:
        """How many of them the guest would take now; it takes them."""
        ...

    def know(self, tap: str, mac: str, address: str) -> None:
        """The host learns that the guest on this tap has an address out of its HOST_ADDRESSES' networks."""
        ...

    def connect(self, source: str, destination: str) -> None:
        """The host tracks a connection."""
        ...

    def flows(self) -> set[frozenset[str]]:
        """The two ends of each tracked connection."""
        ...

    def devices(self) -> set[str]: ...


class FakeTaps:
    def __init__(self, folder: Path) -> None:
        self._world = FakeWorld(folder / "state.json")
        self.network = open_fake(self._world.uri).network

    def add_bridge(self, name: str) -> None:
        self._world.add_bridge(name)

    def add(self, tap: str) -> None:
        self._world.add_tap(tap)

    def remove(self, tap: str) -> None:
        self._world.remove_tap(tap)

    def put_foreign(self, tap: str) -> None:
        self._world.put_foreign_qdisc(tap)

    def wipe(self, tap: str) -> None:
        self._world.drop_qdisc(tap)

    def queue(self, tap: str, packets: int) -> None:
        self._world.queue(tap, packets)

    def waiting(self, tap: str) -> int:
        waiting = self._world.read().taps[tap].waiting
        self._world.queue(tap, -waiting)
        return waiting

    def know(self, tap: str, mac: str, address: str) -> None:
        self._world.add_address(tap, address)

    def connect(self, source: str, destination: str) -> None:
        self._world.add_flow(source, destination)

    def flows(self) -> set[frozenset[str]]:
        return {frozenset(flow) for flow in self._world.read().flows or ()}

    def devices(self) -> set[str]:
        world = self._world.read()
        return {*world.taps, *world.ifbs}


class NamespaceTaps:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.network = TrafficControl(namespace)
        self._tuns: dict[str, Tun] = {}

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[NamespaceTaps]:
        name = f"hvc{os.getpid()}-{next(_numbers)}"
        _run("ip", "netns", "add", name)
        with ExitStack() as left:
            left.callback(_run, "ip", "netns", "del", name)
            taps = cls(name)
            yield taps
            for tun in taps._tuns.values():
                left.callback(tun.close)

    def add_bridge(self, name: str) -> None:
        _run("ip", "-n", self._namespace, "link", "add", name, "type", "bridge")

    def add(self, tap: str) -> None:
        _run("ip", "-n", self._namespace, "tuntap", "add", tap, "mode", "tap")
        _run("ip", "-n", self._namespace, "link", "set", tap, "up")

    def remove(self, tap: str) -> None:
        _run("ip", "-n", self._namespace, "link", "del", tap)

    def put_foreign(self, tap: str) -> None:
        _run("tc", "-n", self._namespace, "qdisc", "replace", "dev", tap, "root", "handle", "1:", "htb")

    def wipe(self, tap: str) -> None:
        for which in ("root", "ingress"):
            _run("tc", "-n", self._namespace, "qdisc", "del", "dev", tap, which)

    def queue(self, tap: str, packets: int) -> None:
        self._guest(tap).arrive(range(packets))

    def _guest(self, tap: str) -> Tun:
        """A tap has a carrier only with somebody at its other end."""
        if tap not in self._tuns:
            self._tuns[tap] = Tun(self._namespace, tap)
            # The kernel drops what is sent before it has worked off that there is a carrier.
            await_true(lambda: self._is_up(tap), f"{tap} is up")
        return self._tuns[tap]

    def _is_up(self, tap: str) -> bool:
        (link,) = json.loads(_run("ip", "-n", self._namespace, "-j", "link", "show", tap))
        return bool(link["operstate"] == "UP")

    def waiting(self, tap: str) -> int:
        return len(self._tuns[tap].take())

    def know(self, tap: str, mac: str, address: str) -> None:
        if "br0" not in self.devices():
            # An address of its own: a bridge that takes its ports' lowest forgets its neighbours with each new one.
            link = ("link", "add", "br0", "address", "52:54:00:00:00:01", "up")
            _run("ip", "-n", self._namespace, *link, "type", "bridge")
            for host in HOST_ADDRESSES:
                _run("ip", "-n", self._namespace, "address", "add", host, "dev", "br0", *["nodad"] * (":" in host))
        self._guest(tap)
        _run("ip", "-n", self._namespace, "link", "set", tap, "master", "br0")
        _run("ip", "-n", self._namespace, "neighbour", "replace", address, "lladdr", mac, "dev", "br0")

    def connect(self, source: str, destination: str) -> None:
        add_flow(self._namespace, source, destination)

    def flows(self) -> set[frozenset[str]]:
        table = _run("ip", "netns", "exec", self._namespace, "cat", "/proc/net/nf_conntrack")
        ends = (re.findall(r"(?:src|dst)=(\S+)", line)[:2] for line in table.splitlines())
        # The kernel writes IPv6 addresses out here.
        return {frozenset(str(ip_address(e)) for e in pair) for pair in ends}

    def devices(self) -> set[str]:
        return {link["ifname"] for link in json.loads(_run("ip", "-n", self._namespace, "-j", "link"))}
