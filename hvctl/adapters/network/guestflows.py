"""Which addresses are a guest's, and the end of what the kernel tracks of them.

Everything that ties an address to a guest was said by the guest: its ARP answers fill the kernel's neighbour table, its
agent names what it likes. So an address counts only if the host itself would send to it straight through the guest's
bridge, if the kernel holds it for nobody else, and if nobody answers for it at another port of that bridge: a guest
that claims the host's, another VM's or a stranger's address ends no connection of theirs. Who cannot answer (a paused
VM, whose address another one took over meanwhile) is not protected by the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from hvctl.adapters.network.addressprobe import Question, answers
from hvctl.adapters.network.conntrack import AbsentError, conntrack
from hvctl.adapters.network.netlink import Rtnetlink, rtnetlink
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Nic

# A neighbour on the same bridge answers in well under a millisecond; an emulated guest that is busy may take longer.
_ANSWER_SECONDS: Final = 0.5


def forget(nics: Sequence[Nic], claims: Mapping[str, Sequence[str]], namespace: str | None = None) -> Forgotten:
    """ports.Network.forget_flows."""
    with rtnetlink(namespace) as kernel:
        addresses, disputed = _addresses(kernel, nics, claims, namespace)
    try:
        with conntrack(namespace) as table:
            deleted = sum(table.forget(flow) for flow in table.flows(addresses))
    except AbsentError:
        return Forgotten(None, addresses, disputed)
    return Forgotten(deleted, addresses, disputed)


def _addresses(
    kernel: Rtnetlink, nics: Sequence[Nic], claims: Mapping[str, Sequence[str]], namespace: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that are the guest's, and those that it claims and that were not believed."""
    links, neighbours = {link.index: link for link in kernel.links()}, kernel.neighbours()
    by_name = {link.name: link for link in links.values()}
    macs, taps = {n.mac.lower() for n in nics}, {n.tap for n in nics if n.tap}
    held: set[str] = set()
    claimed: dict[str, int] = {}
    for nic in nics:
        tap = by_name.get(nic.tap or "")
        if tap is None:
            continue
        device = tap.master or tap.index
        seen = [n.address for n in neighbours if n.index == device and n.mac.lower() == nic.mac.lower()]
        held |= set(seen)
        claimed |= {a: device for a in (*seen, *claims.get(nic.mac.lower(), ())) if _has_one_owner(a)}
    others = {n.address for n in neighbours if n.mac.lower() not in macs}

    questions = []
    for address, device in claimed.items():
        outlet = kernel.outlet(address)
        if outlet and outlet.direct and outlet.index == device and address not in others:
            questions.append(Question(address, links[device].name, links[device].mac, outlet.source))
    answered = answers(questions, _ANSWER_SECONDS, namespace)
    ours = set()
    for question in questions:
        ports = {link.name for link in links.values() if link.master == claimed[question.address]}
        at = answered[question.address]
        if not at & (ports - taps) and (question.address in held or at & taps):
            ours.add(question.address)
    return tuple(sorted(ours)), tuple(sorted(claimed.keys() - ours))


def _has_one_owner(address: str) -> bool:
    """A link-local one means another host on each link, and the kernel does not track of which link a connection is."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if str(parsed) != address or "%" in address:
        return False
    return not (parsed.is_multicast or parsed.is_loopback or parsed.is_unspecified or parsed.is_link_local)
