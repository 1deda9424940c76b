"""The bandwidth of a VM's taps, kept by the kernel's traffic control (ports.Network).

To the guest: a tbf as root qdisc of the tap. From the guest: an ingress qdisc on the tap whose filter redirects
everything to an ifb device with a tbf of its own. The ifb is there as long as any limit is, also one only to the guest:
its alias names the VM, which a tap cannot (its alias is libvirt's), and it outlives the tap. It is up exactly while the
tap's ingress qdisc is hvctl's, so that one which a killed hvctl left without its filter is known again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvctl.adapters.network import guestflows
from hvctl.adapters.network.netlink import ROOT, Filter, Link, Qdisc, Rtnetlink, rtnetlink
from hvctl.adapters.network.shaping import HANDLES, IFB_PREFIX, PREFERENCE, Bucket, Mark, bucket, ifb_name
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.allocation import NicLimit
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Nic
from hvctl.units import format_rate


class TrafficControl:
    """ports.Network on the real kernel, in this process's network namespace or the named one."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace

    def bridge(self, name: str) -> bool:
        with rtnetlink(self._namespace) as kernel:
            link = kernel.link(name)
        return link is not None and link.kind == "bridge"

    def limit(self, tap: str, mac: str) -> NicLimit:
        with rtnetlink(self._namespace) as kernel:
            seen = _look(kernel, tap)
        return NicLimit(mac, seen.inbound, seen.outbound) if seen else NicLimit(mac)

    def foreign(self, tap: str) -> str | None:
        with rtnetlink(self._namespace) as kernel:
            seen = _look(kernel, tap)
        return ", ".join(seen.foreign) or None if seen else None

    def set_limit(self, tap: str, limit: NicLimit, owner: str) -> None:
        """RefusedError also for a rate that is not a whole number of bytes per second or is out of the kernel's range.

        Taking all limits away touches only hvctl's parts: it is not refused where foreign ones are beside them.
        """
        self._set(tap, limit, owner, anew=False)

    def rebuild(self, tap: str, limit: NicLimit, owner: str) -> None:
        """A bucket takes the place of the old one in a single request, and the way of the guest's packets through the
        ifb is mended only where it is broken: the guest is at no moment without its limit."""
        self._set(tap, limit, owner, anew=True)

    def _set(self, tap: str, limit: NicLimit, owner: str, *, anew: bool) -> None:
        with rtnetlink(self._namespace) as kernel:
            seen = _look(kernel, tap)
            if seen is None:
                raise NotFoundError(f"there is no network device {tap!r}.", "hvctl vm list shows which VMs run")
            inbound = None if limit.inbound is None else bucket(limit.inbound, seen.tap.mtu)
            outbound = None if limit.outbound is None else bucket(limit.outbound, seen.tap.mtu)
            if inbound is None and outbound is None:
                _release(kernel, seen)
            else:
                if seen.foreign:
                    raise RefusedError(
                        f"{tap} has traffic control that is not hvctl's: {', '.join(seen.foreign)}.",
                        f"see it with: tc qdisc show dev {tap}; tc filter show dev {tap} ingress",
                    )
                ifb = _mark(kernel, seen, owner)
                _shape_inbound(kernel, seen, inbound, anew)
                _shape_outbound(kernel, seen, ifb, outbound, anew)
            shown = _look(kernel, tap)
        if shown is None:
            raise NotFoundError(f"the network device {tap} went away.", "hvctl vm list shows which VMs run")
        if (shown.inbound, shown.outbound) != (limit.inbound, limit.outbound):
            raise HvctlError(
                f"{tap} shows in {format_rate(shown.inbound)}, out {format_rate(shown.outbound)} after "
                f"in {format_rate(limit.inbound)}, out {format_rate(limit.outbound)} was set.",
                "hvctl doctor checks the host's traffic control",
            )

    def clear(self, owner: str) -> None:
        with rtnetlink(self._namespace) as kernel:
            for ifb in kernel.links():
                mark = _mark_of(ifb)
                if mark is None or mark.owner != owner:
                    continue
                seen = _look(kernel, mark.tap) if mark.tap else None
                if seen and seen.ifb and seen.ifb.index == ifb.index:
                    _release(kernel, seen)
                else:
                    kernel.remove_link(ifb.index)

    def drop_queue(self, tap: str) -> int:
        with rtnetlink(self._namespace) as kernel:
            link = kernel.link(tap)
            if link is None:
                raise NotFoundError(f"there is no network device {tap!r}.", "hvctl vm list shows which VMs run")
            if not link.queue:
                raise RefusedError(
                    f"{tap} has a transmit queue of no length: nothing reaches the guest.",
                    f"ip link set dev {tap} txqueuelen 1000",
                )
            waiting = sum(q.waiting for q in kernel.qdiscs(link.index) if q.parent == ROOT)
            kernel.empty_queue(link)
            after = kernel.link(tap)
        if after and after.queue != link.queue:
            raise HvctlError(
                f"the transmit queue of {tap} has {after.queue} places, not {link.queue} as before.",
                f"ip link set dev {tap} txqueuelen {link.queue}",
            )
        return waiting

    def forget_flows(self, nics: Sequence[Nic], claims: Mapping[str, Sequence[str]]) -> Forgotten:
        return guestflows.forget(nics, claims, self._namespace)

    def owners(self) -> dict[str, tuple[str, ...]]:
        """The owner "" has devices that a killed hvctl made and did not mark; clear("") removes them."""
        found: dict[str, list[str]] = {}
        with rtnetlink(self._namespace) as kernel:
            for link in kernel.links():
                if mark := _mark_of(link):
                    found.setdefault(mark.owner, []).append(link.name)
        return {owner: tuple(sorted(names)) for owner, names in found.items()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """A tap as the kernel shows it. inbound and outbound are in bits per second.

    ifb, root, shaper (the ifb's root), ingress and redirects are hvctl's parts; default is the kind of root qdisc to
    put back, if it is not the kernel's own.
    """

    tap: Link
    ifb: Link | None
    root: Qdisc | None
    shaper: Qdisc | None
    ingress: bool
    redirects: tuple[Filter, ...]
    default: str
    foreign: tuple[str, ...]
    inbound: int | None
    outbound: int | None


def _mark_of(link: Link) -> Mark | None:
    """The mark of an ifb that hvctl made; None for any other device."""
    return Mark.parse(link.alias) if link.kind == "ifb" and link.name.startswith(IFB_PREFIX) else None


def _is_ours(qdisc: Qdisc) -> bool:
    return qdisc.kind == "tbf" and qdisc.handle in HANDLES and qdisc.parent == ROOT


def _is_libvirts(qdisc: Qdisc) -> bool:
    """libvirt puts noqueue on every tap it makes; the kernel's own noqueue has no number."""
    return qdisc.kind == "noqueue" and qdisc.parent == ROOT and qdisc.handle != 0


def _look(kernel: Rtnetlink, name: str) -> _Seen | None:
    """Everything that matters on a tap; None if there is no such device."""
    tap, ifb = kernel.link(name), kernel.link(ifb_name(name))
    if tap is None:
        return None
    foreign: list[str] = []
    mark = _mark_of(ifb) if ifb else None
    if ifb and mark is None:
        foreign.append(f"device {ifb.name}")
        ifb = None
    qdiscs = kernel.qdiscs(tap.index, *([ifb.index] if ifb else []))
    on_tap = [q for q in qdiscs if q.index == tap.index]
    root = next((q for q in on_tap if _is_ours(q)), None)
    shaper = next((q for q in qdiscs if ifb and q.index == ifb.index and _is_ours(q)), None)
    # A qdisc without a number was put there by the kernel, not by anybody.
    foreign += [str(q) for q in on_tap if q.handle and q.kind != "ingress" and not _is_ours(q) and not _is_libvirts(q)]

    present = any(q.kind == "ingress" for q in on_tap)
    filters = kernel.ingress_filters(tap.index) if present else ()
    targets = (0, ifb.index) if ifb else (0,)
    redirects = tuple(f for f in filters if (f.kind, f.preference) == ("u32", PREFERENCE) and f.target in targets)
    theirs = [str(f) for f in filters if f not in redirects]
    foreign += theirs
    ingress = present and not theirs and bool(redirects or (ifb and ifb.up))
    if present and not ingress and not theirs:
        foreign.append("ingress ffff:")

    default = "noqueue" if any(_is_libvirts(q) for q in on_tap) else mark.default if root and mark else ""
    active = bool(ifb and ifb.up and any(f.target == ifb.index for f in redirects))
    return _Seen(
        tap,
        ifb,
        root,
        shaper,
        ingress,
        redirects,
        default,
        tuple(foreign),
        _bits(root),
        _bits(shaper) if active else None,
    )


def _bits(qdisc: Qdisc | None) -> int | None:
    return qdisc.bucket.rate * 8 if qdisc and qdisc.bucket else None


def _mark(kernel: Rtnetlink, seen: _Seen, owner: str) -> Link:
    """The tap's ifb, made if it is not there, with the VM's mark. One that an earlier VM's tap of this name left
    behind is taken over: a name belongs to one tap at a time."""
    ifb = seen.ifb or kernel.make_ifb(ifb_name(seen.tap.name))
    alias = Mark(owner, seen.tap.name, seen.default).alias
    if ifb.alias != alias:
        kernel.set_alias(ifb.index, alias)
    return ifb


def _shape_inbound(kernel: Rtnetlink, seen: _Seen, wanted: Bucket | None, anew: bool = False) -> None:
    if wanted:
        _put_bucket(kernel, seen.tap, seen.root, wanted, anew)
    elif seen.root and seen.default:
        kernel.put_noqueue(seen.tap.index)
    elif seen.root:
        kernel.remove_root(seen.tap.index, seen.root.handle)


def _put_bucket(kernel: Rtnetlink, link: Link, shown: Qdisc | None, wanted: Bucket, anew: bool) -> None:
    """In place where that is safe; else, and anew, by replacing, which costs a stream the packets that wait, and not
    itself."""
    if shown is None or shown.bucket is None:
        kernel.put_tbf(link.index, HANDLES[0], wanted)
    elif anew or (shown.bucket.rate, shown.bucket.queue) != (wanted.rate, wanted.queue):
        in_place = not anew and wanted.fits_over(shown.bucket)
        handle = next(h for h in HANDLES if (h == shown.handle) is in_place)
        kernel.put_tbf(link.index, handle, wanted)


def _shape_outbound(kernel: Rtnetlink, seen: _Seen, ifb: Link, wanted: Bucket | None, anew: bool) -> None:
    """The way for the guest's packets is whole before the filter sends the first one there."""
    if wanted is None:
        _release_outbound(kernel, seen)
        kernel.set_state(ifb.index, up=False)
        if seen.shaper:
            kernel.remove_root(ifb.index, seen.shaper.handle)
        return
    _put_bucket(kernel, ifb, seen.shaper, wanted, anew)
    kernel.set_state(ifb.index, up=True)
    if not seen.ingress:
        kernel.add_ingress(seen.tap.index)
    if [f.target for f in seen.redirects] != [ifb.index]:
        if seen.redirects:
            kernel.remove_redirect(seen.tap.index)
        kernel.add_redirect(seen.tap.index, ifb.index)


def _release_outbound(kernel: Rtnetlink, seen: _Seen) -> None:
    if seen.redirects:
        kernel.remove_redirect(seen.tap.index)
    if seen.ingress:
        kernel.remove_ingress(seen.tap.index)


def _release(kernel: Rtnetlink, seen: _Seen) -> None:
    """Remove every part of hvctl's, the ifb last: until then its mark leads a later attempt here."""
    _release_outbound(kernel, seen)
    _shape_inbound(kernel, seen, None)
    if seen.ifb:
        kernel.remove_link(seen.ifb.index)
