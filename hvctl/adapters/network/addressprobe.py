"""Asks on a bridge who has an address (ARP, RFC 826; neighbour discovery, RFC 4861) and sees at which of the host's
devices each answer arrives, which no guest can forge, as it can everything that is written in the answer."""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from struct import Struct, pack
from typing import Final

from hvctl.adapters.network.netlink import within

_ALL, _ARP, _IPV6 = 0x0003, 0x0806, 0x86DD
_ARP_REQUEST, _ARP_REPLY = 1, 2
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_SO_ATTACH_FILTER: Final = 26
_OUTGOING: Final = 4
_LARGEST: Final = 256  # bytes of a frame that are looked at

# Classic BPF: only ARP replies and neighbour advertisements wake us, whatever else the host's devices carry.
_LOAD_BYTE, _LOAD_HALF, _EQUALS, _RETURN = 0x30, 0x28, 0x15, 0x06
_INSTRUCTION = Struct("=HBBI")
_PROGRAM: Final = (
    (_LOAD_HALF, 0, 0, 12),
    (_EQUALS, 0, 2, _ARP),
    (_LOAD_HALF, 0, 0, 20),
    (_EQUALS, 5, 6, _ARP_REPLY),
    (_EQUALS, 0, 5, _IPV6),
    (_LOAD_BYTE, 0, 0, 20),
    (_EQUALS, 0, 3, _ICMPV6),
    (_LOAD_BYTE, 0, 0, 54),
    (_EQUALS, 0, 1, _ADVERTISEMENT),
    (_RETURN, 0, 0, _LARGEST),
    (_RETURN, 0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class Question:
    """Who has `address`, asked through the device by its MAC and from its own address there (None: it has none)."""

    address: str
    device: str
    mac: str
    source: str | None


def answers(questions: Iterable[Question], seconds: float, namespace: str | None = None) -> dict[str, set[str]]:
    """The devices at which answers arrived within `seconds`, by address. It takes that long: nobody tells that no
    further answer comes. OSError of the kernel."""
    found: dict[str, set[str]] = {q.address: set() for q in questions}
    if not found:
        return found
    with within(namespace, _listener) as listener:
        for question in questions:
            frame, protocol = _frame(question)
            listener.sendto(frame, (question.device, protocol))
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                frame, (device, _, direction, *_) = listener.recvfrom(_LARGEST)
            except TimeoutError:
                break
            # A bridge sends what it took in at one port out of others, which is not an answer of those.
            if direction != _OUTGOING and (address := _answered(frame)) in found:
                found[address].add(device)
    return found


def _listener() -> socket.socket:
    """It hears all devices of its network namespace."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(_ALL))
    try:
        code = b"".join(_INSTRUCTION.pack(*i) for i in _PROGRAM)
        buffer = ctypes.create_string_buffer(code, len(code))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pack("HP", len(_PROGRAM), ctypes.addressof(buffer)))
        # What came in before the filter was there is no answer to anything.
        with suppress(BlockingIOError):
            while listener.recv(1, socket.MSG_DONTWAIT):
                pass
    except BaseException:
        listener.close()
        raise
    return listener


def _frame(question: Question) -> tuple[bytes, int]:
    mac, address = bytes.fromhex(question.mac.replace(":", "")), ip_address(question.address)
    source = ip_address(question.source) if question.source else None
    if isinstance(address, IPv4Address):
        sender = source.packed if source else bytes(4)
        request = pack("!HHBBH", 1, 0x0800, 6, 4, _ARP_REQUEST) + mac + sender + bytes(6) + address.packed
        return b"\xff" * 6 + mac + pack("!H", _ARP) + request, _ARP
    sender = source.packed if source else bytes(16)
    # The group of all nodes whose address ends so (RFC 4291, 2.7.1), and the MAC that stands for it.
    group = IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:]
    option = pack("!BB", 1, 1) + mac if source else b""
    body = bytes(4) + address.packed + option
    pseudo = sender + group + pack("!II", len(body) + 4, _ICMPV6) + pack("!BBH", _SOLICITATION, 0, 0) + body
    packet = pack("!IHBB", 6 << 28, len(body) + 4, _ICMPV6, 255) + sender + group
    packet += pack("!BBH", _SOLICITATION, 0, _checksum(pseudo)) + body
    return b"\x33\x33" + group[12:] + mac + pack("!H", _IPV6) + packet, _IPV6


def _checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _answered(frame: bytes) -> str | None:
    """The address that a frame answers for."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == _ARP and len(frame) >= 42:
        return str(IPv4Address(frame[28:32]))
    if kind == _IPV6 and len(frame) >= 78:
        return str(IPv6Address(frame[62:78]))
    return None
