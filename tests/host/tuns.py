"""A tap whose guest a test plays: what arrives waits until the test takes it; and connections that a kernel tracks."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from pyroute2 import NFCTSocket
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from host.namespaces import within

_KIND = 0x88B5  # IEEE 802's own for experiments
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000


class Tun:
    """The guest's end of a tap, and a way for packets to it."""

    def __init__(self, namespace: str | None, tap: str) -> None:
        def make() -> tuple[int, socket.socket]:
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH14x", tap.encode(), _TAP_WITHOUT_HEADER))
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sender.bind((tap, 0))
            return end, sender

        self._end, self._sender = within(namespace, make)

    def arrive(self, numbers: Iterable[int]) -> None:
        """Packets of 1000 bytes, one for each number, as far as there is room for them."""
        for number in numbers:
            with suppress(OSError):
                self._sender.send(bytes(12) + struct.pack("!HI", _KIND, number) + bytes(982))

    def take(self) -> list[int]:
        """The numbers of what waits, as the guest would get it."""
        return [struct.unpack_from("!I", f, 14)[0] for f in self.frames() if f[12:14] == struct.pack("!H", _KIND)]

    def frames(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(os.read(self._end, 1 << 16))
            except BlockingIOError:
                return found

    def send(self, frame: bytes) -> None:
        """The guest sends."""
        os.write(self._end, frame)

    def fileno(self) -> int:
        return self._end

    def close(self) -> None:
        os.close(self._end)
        self._sender.close()


def add_flow(namespace: str | None, source: str, destination: str) -> None:
    """A connection as the kernel would track it."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET

    def add() -> None:
        there = NFCTAttrTuple(family, source, destination, socket.IPPROTO_UDP, 1000, 53)
        with NFCTSocket(family) as table:
            table.entry("add", timeout=300, tuple_orig=there, tuple_reply=there.reverse())

    within(namespace, add)
