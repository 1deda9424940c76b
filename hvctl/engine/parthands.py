"""What the steps around the inside of a guest do: the network path of a VM, and its page cache."""

from __future__ import annotations

from collections.abc import Callable

from hvctl.engine.applied import AGENT_SECONDS, Applied, agent_call
from hvctl.engine.reclaim import reclaim
from hvctl.errors import HvctlError
from hvctl.model import plan as p
from hvctl.model.vm import Vm
from hvctl.ports import Host


def part_hand(host: Host, step: p.Step, margin: int, vm: Callable[[str], Vm]) -> Applied:
    match step:
        case p.DropQueues(uuid):
            waiting = sum(host.network.drop_queue(n.tap) for n in vm(uuid).nics if n.tap)
            return Applied(facts={"shaped": waiting})
        case p.ForgetFlows(uuid):
            return _forget_flows(host, vm(uuid))
        case p.DropCaches(uuid):
            done = reclaim(host, vm(uuid), margin)
            return Applied(facts={"won": done.won, "before": done.before, "after": done.after})
        case _:
            raise AssertionError(f"no hand for {step!r}")


def _forget_flows(host: Host, vm: Vm) -> Applied:
    found = host.network.forget_flows(vm.nics, _claims(host, vm))
    facts = {"deleted": found.deleted, "addresses": list(found.addresses)}
    if found.deleted is None:
        return Applied(warning="the host's kernel does not track connections: there was nothing to delete", facts=facts)
    if found.disputed:
        said = ", ".join(found.disputed)
        return Applied(warning=f"others answer for {said} too, so what is tracked of it was left", facts=facts)
    return Applied(facts=facts)


def _claims(host: Host, vm: Vm) -> dict[str, list[str]]:
    """The guest's addresses in its own words, by MAC; none where its agent does not answer."""
    try:
        answer = agent_call(host, vm.uuid)("guest-network-get-interfaces", {}, AGENT_SECONDS)
    except HvctlError:
        return {}
    claims: dict[str, list[str]] = {}
    for nic in answer if isinstance(answer, list) else ():
        if isinstance(nic, dict) and isinstance(mac := nic.get("hardware-address"), str):
            found = nic.get("ip-addresses")
            words = [a.get("ip-address") for a in found if isinstance(a, dict)] if isinstance(found, list) else []
            claims[mac.lower()] = [w for w in words[:64] if isinstance(w, str)]
    return claims
