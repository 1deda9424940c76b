"""Links, qdiscs and filters of the kernel over rtnetlink: the one door to pyroute2.

It knows how to ask and to change; what the parts mean to hvctl is in traffic.py.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from hvctl.adapters.shaping import PREFERENCE, Bucket
from hvctl.errors import HvctlError, NotFoundError, UnreachableError

ROOT = 0xFFFFFFFF
INGRESS = 0xFFFF0000

_IFF_UP = 0x1
_ETH_P_ALL = 0x0003
_TICK_NANOSECONDS = 64
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    kind: str | None
    alias: str | None
    up: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class Qdisc:
    """bucket is a tbf's; None for every other kind."""

    index: int
    kind: str
    handle: int
    parent: int
    bucket: Bucket | None

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
        raise _translated(e.code, str(e.args[-1])) from e
    except OSError as e:
        raise _translated(e.errno or 0, str(e)) from e


def _socket(namespace: str | None) -> int | None:
    """Made by a thread that enters the namespace: pyroute2's own way forks, and a fork would keep hvctl's locks."""
    if namespace is None:
        return None

    def make() -> int:
        netns.setns(namespace, flags=0)
        return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE).detach()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


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


def _translated(code: int, message: str) -> HvctlError:
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
    )


def _qdisc(message: Any) -> Qdisc:
    kind = message.get_attr("TCA_KIND")
    found = message.get_nested("TCA_OPTIONS", "TCA_TBF_PARMS") if kind == "tbf" else None
    bucket = None
    if found:
        # The kernel tells the depth as the time that its tokens take to arrive.
        depth = found["buffer"] * _TICK_NANOSECONDS * found["rate"] // 1_000_000_000
        bucket = Bucket(found["rate"], depth, found["limit"])
    return Qdisc(message["index"], kind, message["handle"], message["parent"], bucket)


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
