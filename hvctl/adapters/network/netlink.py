"""Links, qdiscs, filters, neighbours and routes of the kernel over rtnetlink: the one door to pyroute2.

It knows how to ask and to change; what the parts mean to hvctl is in traffic.py.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar

from pyroute2 import IPRoute, netns
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.rtnl import RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from hvctl.adapters.network.shaping import PREFERENCE, Bucket
from hvctl.errors import HvctlError, NotFoundError, UnreachableError

ROOT = 0xFFFFFFFF
INGRESS = 0xFFFF0000

_IFF_UP = 0x1
_ETH_P_ALL = 0x0003
_TICK_NANOSECONDS = 64
_ATTEMPTS = 3
_NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
_RTN_UNICAST = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Link:
    """master is the index of the bridge that it is a port of, queue its tx_queue_len in packets."""

    index: int
    name: str
    kind: str | None
    alias: str | None
    up: bool
    mtu: int
    mac: str
    queue: int
    master: int | None


@dataclass(frozen=True, slots=True)
class Qdisc:
    """bucket is a tbf's; None for every other kind. waiting are packets, those of its children included."""

    index: int
    kind: str
    handle: int
    parent: int
    bucket: Bucket | None
    waiting: int = 0

    def __str__(self) -> str:
        under = "root" if self.parent == ROOT else f"parent {self.parent >> 16:x}:{self.parent & 0xFFFF:x}"
        return f"{self.kind} {self.handle >> 16:x}: {under}"


@dataclass(frozen=True, slots=True)
class Filter:
    """target is the device that packets are redirected to, 0 if that device is gone, None for another action."""

    kind: str
    preference: int
    target: int | None

    def __str__(self) -> str:
        return f"{self.kind} filter pref {self.preference} on ingress ffff:"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An address that the kernel sends to a MAC through the device `index`."""

    index: int
    address: str
    mac: str


@dataclass(frozen=True, slots=True)
class Outlet:
    """How the kernel would send to an address: through which device, from which of its own addresses, and whether
    straight to it and not to a gateway."""

    index: int
    source: str | None
    direct: bool


class Rtnetlink:
    """One netlink socket's conversation with the kernel; use it within `rtnetlink()`."""

    def __init__(self, route: IPRoute) -> None:
        self._route = route

    def link(self, name: str) -> Link | None:
        try:
            return _link(_ask(self._route.link, "get", ifname=name)[0])
        except NetlinkError as e:
            # ERANGE: longer than any device's name can be.
            if e.code in (errno.ENODEV, errno.ERANGE):
                return None
            raise

    def links(self) -> tuple[Link, ...]:
        return tuple(_link(m) for m in _ask(self._route.link, "dump"))

    def qdiscs(self, *indices: int) -> tuple[Qdisc, ...]:
        """Of these devices, in the kernel's order. The kernel can only tell those of all devices."""
        return tuple(_qdisc(m) for m in _ask(self._route.tc, "dump") if m["index"] in indices)

    def ingress_filters(self, index: int) -> tuple[Filter, ...]:
        found = [_filter(m) for m in _ask(self._route.get_filters, index=index, parent=INGRESS)]
        # A classifier is listed once for itself, for u32 once for each hash table, and once for each rule it holds.
        with_rules = {(f.kind, f.preference) for f, rule in found if rule}
        return tuple(dict.fromkeys(f for f, rule in found if rule or (f.kind, f.preference) not in with_rules))

    def make_ifb(self, name: str) -> Link:
        _ask(self._route.link, "add", ifname=name, kind="ifb")
        return _link(_ask(self._route.link, "get", ifname=name)[0])

    def set_alias(self, index: int, alias: str) -> None:
        _ask(self._route.link, "set", index=index, ifalias=alias)

    def set_state(self, index: int, up: bool) -> None:
        _ask(self._route.link, "set", index=index, state="up" if up else "down")

    def remove_link(self, index: int) -> None:
        _ask(self._route.link, "del", index=index)

    def empty_queue(self, link: Link) -> None:
        """Drop what waits in a device: in the driver's ring (of a tun or macvtap, whose ring has as many places as the
        queue has) and in its qdiscs, which the kernel resets when the length changes.

        Both changes are one message to the kernel, which works it off before the call returns: nobody who is killed
        leaves the device with a queue of no length, through which nothing would pass.
        """
        _ask(self._route.nlm_request_batch, [_queue(link.index, 0), _queue(link.index, link.queue)])

    def neighbours(self) -> tuple[Neighbour, ...]:
        """Those whose MAC the kernel would use."""
        return tuple(
            Neighbour(m["ifindex"], m.get_attr("NDA_DST"), m.get_attr("NDA_LLADDR"))
            for m in _ask(self._route.get_neighbours)
            if m["state"] & _NUD_VALID and m.get_attr("NDA_LLADDR") and m.get_attr("NDA_DST")
        )

    def outlet(self, address: str) -> Outlet | None:
        """None for an address that the kernel sends to nobody else: its own, a multicast one, one without a route."""
        family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
        try:
            (message,) = _ask(self._route.route, "get", dst=address, family=family)
        except NetlinkError as e:
            if e.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
                return None
            raise
        if message["type"] != _RTN_UNICAST:
            return None
        gateway = message.get_attr("RTA_GATEWAY") or message.get_attr("RTA_VIA") or message.get_attr("RTA_MULTIPATH")
        return Outlet(message.get_attr("RTA_OIF") or 0, message.get_attr("RTA_PREFSRC"), not gateway)

    def put_tbf(self, index: int, handle: int, bucket: Bucket) -> None:
        """As the root qdisc: changed in place if that has this handle, else put in its place."""
        _ask(
            self._route.tc,
            "replace",
            "tbf",
            index,
            handle,
            rate=bucket.rate,
            burst=bucket.burst,
            limit=bucket.queue,
        )

    def put_noqueue(self, index: int) -> None:
        _ask(self._route.tc, "replace", "noqueue", index)

    def remove_root(self, index: int, handle: int) -> None:
        """The kernel refuses if another root qdisc took its place meanwhile."""
        _ask(self._route.tc, "del", index=index, handle=handle, parent=ROOT)

    def add_ingress(self, index: int) -> None:
        _ask(self._route.tc, "add", "ingress", index)

    def remove_ingress(self, index: int) -> None:
        _ask(self._route.tc, "del", "ingress", index)

    def add_redirect(self, index: int, target: int) -> None:
        """Everything that enters through a device leaves through another."""
        _ask(
            self._route.tc,
            "add-filter",
            "u32",
            index,
            parent=INGRESS,
            prio=PREFERENCE,
            protocol=_ETH_P_ALL,
            target=0,
            keys=["0x0/0x0+0"],
            action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target},
        )

    def remove_redirect(self, index: int) -> None:
        info = socket.htons(_ETH_P_ALL) | PREFERENCE << 16
        _ask(self._route.tc, "del-filter", index=index, parent=INGRESS, info=info)


@contextmanager
def rtnetlink(namespace: str | None = None) -> Iterator[Rtnetlink]:
    """A socket in this process's network namespace or the named one, for one task.

    Not kept open: threads share nothing, and a daemon holds nothing. Netlink's errors leave as hvctl's.
    """
    try:
        with IPRoute(fileno=_socket(namespace), ext_ack=True) as route:
            yield Rtnetlink(route)
    except NetlinkError as e:
        raise translated(e.code, str(e.args[-1])) from e
    except OSError as e:
        raise translated(e.errno or 0, str(e)) from e


def _socket(namespace: str | None) -> int | None:
    def make() -> int:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE).detach()

    return None if namespace is None else within(namespace, make)


def within(namespace: str | None, make: Callable[[], T]) -> T:
    """What `make` returns in the named network namespace (None: in this process's own).

    A thread enters it, and ends in it: pyroute2's own way forks, and a fork would keep hvctl's locks.
    """
    if namespace is None:
        return make()

    def enter() -> T:
        netns.setns(namespace, flags=0)
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


def _queue(index: int, length: int) -> Any:
    message = ifinfmsg()
    message["index"] = index
    message["header"]["type"] = RTM_SETLINK
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
    message["attrs"] = [["IFLA_TXQLEN", length]]
    return message


def _ask(request: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """One request, answered completely. What only says "not now" is asked again: each request is idempotent."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return list(request(*args, **kwargs))
        except NetlinkError as e:
            transient = isinstance(e, NetlinkDumpInterrupted) or e.code in (errno.EBUSY, errno.ENOBUFS)
            if not transient or attempt == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def translated(code: int, message: str) -> HvctlError:
    if code in (errno.EPERM, errno.EACCES):
        return UnreachableError(
            "the kernel does not let this user change traffic control.", "run hvctl as root, or with CAP_NET_ADMIN"
        )
    if code in (errno.ENODEV, errno.ENXIO):
        return NotFoundError("the network device is gone.", "hvctl vm list shows which VMs run")
    name = errno.errorcode.get(code, str(code))
    return HvctlError(
        f"the kernel refused traffic control: {message} ({name}).", "hvctl doctor checks the host's traffic control"
    )


def _link(message: Any) -> Link:
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"),
        alias=message.get_attr("IFLA_IFALIAS"),
        up=bool(message["flags"] & _IFF_UP),
        mtu=message.get_attr("IFLA_MTU"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        queue=message.get_attr("IFLA_TXQLEN") or 0,
        master=message.get_attr("IFLA_MASTER"),
    )


def _qdisc(message: Any) -> Qdisc:
    kind = message.get_attr("TCA_KIND")
    found = message.get_nested("TCA_OPTIONS", "TCA_TBF_PARMS") if kind == "tbf" else None
    bucket = None
    if found:
        # The kernel tells the depth as the time that its tokens take to arrive.
        depth = found["buffer"] * _TICK_NANOSECONDS * found["rate"] // 1_000_000_000
        bucket = Bucket(found["rate"], depth, found["limit"])
    waiting = message.get_nested("TCA_STATS2", "TCA_STATS_QUEUE")
    return Qdisc(
        message["index"], kind, message["handle"], message["parent"], bucket, waiting["qlen"] if waiting else 0
    )


def _filter(message: Any) -> tuple[Filter, bool]:
    """A filter, and whether the message is of one of its rules."""
    kind, preference = message.get_attr("TCA_KIND"), message["info"] >> 16
    options = message.get_attr("TCA_OPTIONS")
    if kind != "u32":
        return Filter(kind, preference, None), bool(message["handle"])
    rule = bool(options and options.get_attr("TCA_U32_SEL"))
    actions = options.get_attr("TCA_U32_ACT") if options else None
    first = actions.get_attr("TCA_ACT_PRIO_1") if actions else None
    mirred = first.get_nested("TCA_ACT_OPTIONS", "TCA_MIRRED_PARMS") if first else None
    return Filter(kind, preference, mirred["ifindex"] if mirred else None), rule
