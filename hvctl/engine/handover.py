"""What a host's pool is, who is admitted to it, and what changes hands when a VM was interrupted or came back: worked
out here, written in the transaction that begins or ends the operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace

from hvctl.adapters.store.poolstore import PoolMove
from hvctl.decide.admission import admit, capacity_of, holders
from hvctl.decide.reservations import grantable
from hvctl.engine.observe import observe_all
from hvctl.engine.site import Site
from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.allocation import Resources
from hvctl.model.host import Capacity, Ledger
from hvctl.model.operation import Before, Kind, OpState
from hvctl.model.pool import Limits, Reservation
from hvctl.model.vm import Vm
from hvctl.ports import Host
from hvctl.settings import Settings


def limited(settings: Settings, limits: Limits) -> Settings:
    """The settings with what was set for this host's pool."""
    given = {f.name: v for f in fields(limits) if (v := getattr(limits, f.name)) is not None}
    return replace(settings, **given) if given else settings


def capacity(site: Site) -> Capacity:
    return capacity_of(site.facts, limited(site.settings, site.store.pool.limits(site.facts.name)))


def _holders(host: Host, ledger: Ledger, observed: Sequence[Vm]) -> dict[str, tuple[str, Resources]]:
    """Who holds what. A VM that was off a moment ago, and is promised room now, may have been started in between: a
    look under the host's lock decides. There are few such VMs, since a stop takes the promise away."""
    promised = {p.vm_uuid for p in ledger.promised if p.holds and not p.busy}
    seen = []
    for vm in observed:
        if vm.uuid in promised and not vm.state.active:
            with suppress(NotFoundError):
                seen.append(host.domains.get(vm.uuid))
        else:
            seen.append(vm)
    return holders(ledger, seen)


def admission(
    site: Site, vm: Vm | None, want: Resources | None, uuid: str, name: str
) -> Callable[[Ledger], None] | None:
    """The check that opening the row makes; what is observed is read before, so that nothing slow happens under
    the host's lock. Nobody else is looked at for a VM that runs and asks for no more than it was promised: that is
    never refused, and its promise changes only under its own lock."""
    if want is None:
        return None
    if vm is not None and vm.state.active:
        own = site.store.promise_of(site.facts.name, uuid)
        if own is not None and own.holds and own.resources.largest(want) == own.resources:
            return None
    observed = observe_all(site.host)
    most, now = capacity(site), site.clock()

    def check(ledger: Ledger) -> None:
        held = _holders(site.host, ledger, observed)
        refusal = admit(most, held, uuid, want, ledger.reservations, name, now)
        if refusal:
            raise RefusedError(refusal.message, refusal.hint)

    return check


def room_for(site: Site, most: Capacity, observed: Sequence[Vm], ledger: Ledger, reservation: Reservation) -> Resources:
    """What a reservation may keep from its start (or now) to its end, others and its owner's own counted."""
    names = {vm.uuid: vm.name for vm in observed}
    return grantable(most, _holders(site.host, ledger, observed), ledger.reservations, reservation, names, site.clock())


def pool_move(site: Site, kind: Kind, before: Before, state: OpState) -> PoolMove | None:
    """None where nothing changes hands. Everything is looked at anew: the victim was observed off."""
    if state is not OpState.DONE or before.away is None:
        return None
    away = before.away
    if kind is Kind.RESUME:
        return PoolMove(back=away.vm_uuid, returns=away.returns, at=site.clock())
    if kind is not Kind.INTERRUPT:
        return None
    observed, most = observe_all(site.host), capacity(site)
    return PoolMove(
        replace(away, out_at=site.clock()),
        lambda ledger, demand: room_for(site, most, observed, ledger, demand),
        at=site.clock(),
    )
