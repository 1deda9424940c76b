"""The kernel's connection tracking over ctnetlink: which entries touch some addresses, and the end of one of them.

Spoken directly and not through pyroute2, which takes 70 us to decode an entry (a full table has 262144) and leaves out
the zones of a tuple; here an entry that is not wanted costs a search in its bytes, and one that is wanted is named to
the kernel with the very bytes that the kernel sent. include/uapi/linux/netfilter/nfnetlink_conntrack.h has the numbers.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count
from struct import Struct
from typing import Final

from hvctl.adapters.network.netlink import translated, within
from hvctl.errors import DeadlineError

_NETFILTER: Final = 12
_SUBSYSTEM: Final = 1 << 8
_NEW, _GET, _DELETE = (_SUBSYSTEM | n for n in range(3))
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_HEADER, _FAMILY, _ATTRIBUTE, _CODE = Struct("=IHHII"), Struct("=BBH"), Struct("=HH"), Struct("=i")
_TUPLE_ORIGINAL, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18
_TUPLE_IP: Final = 1
_TYPE: Final = 0x3FFF  # without the bits that say "nested" and "in network order"
_SECONDS: Final = 5.0
_BUFFER: Final = 1 << 16
# What a kernel answers that has no netfilter over netlink, and one that has it without conntrack.
_NO_NETFILTER: Final = frozenset({errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})
_NO_CONNTRACK: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class Flow:
    """One tracked connection. name is what identifies it to the kernel, as the kernel wrote it."""

    family: int
    name: bytes


class AbsentError(Exception):
    """This kernel tracks no connections."""


class Conntrack:
    """One socket's conversation with the kernel; use it within `conntrack()`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._numbers = count(1)

    def flows(self, addresses: Iterable[str]) -> list[Flow]:
        """Those that have one of the addresses at any of their ends, before or after address translation.
        AbsentError if this kernel has no conntrack."""
        found: list[Flow] = []
        packed = {ip_address(a).packed for a in addresses}
        for family, length in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            wanted = {p for p in packed if len(p) == length}
            if not wanted:
                continue
            for message in self._entries(family):
                if any(address in message for address in wanted):
                    attributes = dict(_attributes(message[_FAMILY.size :]))
                    if wanted & _ends(attributes):
                        found.append(Flow(family, _name(attributes)))
        return found

    def count(self, addresses: Iterable[str]) -> dict[str, int]:
        """How many entries have each of the addresses at any of their ends; those with none are left out.
        AbsentError if this kernel has no conntrack."""
        counts: dict[str, int] = {}
        names = {ip_address(a).packed: a for a in addresses}
        for family, length in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            wanted = {p for p in names if len(p) == length}
            for message in self._entries(family) if wanted else ():
                for end in wanted & _ends(dict(_attributes(message[_FAMILY.size :]))):
                    counts[names[end]] = counts.get(names[end], 0) + 1
        return counts

    def _entries(self, family: int) -> Iterator[bytes]:
        try:
            yield from self._ask(_GET, _DUMP, family, b"")
        except OSError as e:
            if e.errno in _NO_CONNTRACK:
                raise AbsentError from e
            raise

    def forget(self, flow: Flow) -> bool:
        """Whether it was there to be deleted."""
        try:
            list(self._ask(_DELETE, _ACK, flow.family, flow.name))
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True

    def _ask(self, command: int, flags: int, family: int, attributes: bytes) -> Iterator[bytes]:
        """The messages of the answer, each without its netlink header."""
        number = next(self._numbers)
        length = _HEADER.size + _FAMILY.size + len(attributes)
        header = _HEADER.pack(length, command, _REQUEST | flags, number, 0)
        self._socket.send(header + _FAMILY.pack(family, 0, 0) + attributes)
        while True:
            datagram = self._socket.recv(_BUFFER)
            at = 0
            while at < len(datagram):
                size, kind, _, answered, _ = _HEADER.unpack_from(datagram, at)
                body = datagram[at + _HEADER.size : at + size]
                at += (size + 3) & ~3
                if answered != number:
                    continue
                if kind in (_ERROR, _DONE):
                    (code,) = _CODE.unpack_from(body)
                    if code < 0:
                        raise OSError(-code, "conntrack")
                    return
                yield body


@contextmanager
def conntrack(namespace: str | None = None) -> Iterator[Conntrack]:
    """A socket in this process's network namespace or the named one. AbsentError if this kernel has no conntrack;
    other errors of the kernel leave as hvctl's."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)

    try:
        with within(namespace, make) as connection:
            connection.settimeout(_SECONDS)
            yield Conntrack(connection)
    except TimeoutError as e:
        raise DeadlineError(f"the kernel's connection tracking did not answer within {_SECONDS:g} s.") from e
    except OSError as e:
        if e.errno in _NO_NETFILTER:
            raise AbsentError from e
        raise translated(e.errno or 0, "its connection tracking") from e


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE, data[at : at + length]
        at += (length + 3) & ~3


def _ends(attributes: dict[int, bytes]) -> set[bytes]:
    """The addresses of both tuples."""
    found = set()
    for kind in (_TUPLE_ORIGINAL, _TUPLE_REPLY):
        inside = dict(_attributes(attributes.get(kind, b"")[_ATTRIBUTE.size :]))
        found |= {a[_ATTRIBUTE.size :] for _, a in _attributes(inside.get(_TUPLE_IP, b"")[_ATTRIBUTE.size :])}
    return found


def _name(attributes: dict[int, bytes]) -> bytes:
    """The identifier tells an entry from a later one of the same tuple."""
    return b"".join(a + bytes(-len(a) % 4) for k in (_TUPLE_ORIGINAL, _ZONE, _ID) if (a := attributes.get(k)))
