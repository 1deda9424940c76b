"""What a host's pool is, and what changes hands when a VM was interrupted or came back: worked out here, written in the
transaction that ends the operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from hvctl.adapters.store.poolstore import PoolMove
from hvctl.decide.admission import capacity_of, holders
from hvctl.decide.reservations import grantable
from hvctl.engine.observe import observe_all
from hvctl.model.allocation import Resources
from hvctl.model.host import Capacity, Ledger
from hvctl.model.operation import Before, Kind, OpState
from hvctl.model.pool import Limits, Reservation
from hvctl.model.vm import Vm
from hvctl.settings import Settings

if TYPE_CHECKING:
    from hvctl.engine.operate import Engine


def limited(settings: Settings, limits: Limits) -> Settings:
    """The settings with what was set for this host's pool."""
    given = {f.name: v for f in fields(limits) if (v := getattr(limits, f.name)) is not None}
    return replace(settings, **given) if given else settings


def capacity(engine: Engine) -> Capacity:
    return capacity_of(engine.facts, limited(engine.settings, engine.store.pool.limits(engine.facts.name)))


def room_for(
    engine: Engine, most: Capacity, observed: Sequence[Vm], ledger: Ledger, reservation: Reservation
) -> Resources:
    """What a reservation may keep from its start (or now) to its end, others and its owner's own counted."""
    names = {vm.uuid: vm.name for vm in observed}
    return grantable(most, holders(ledger, observed), ledger.reservations, reservation, names, engine.clock())


def pool_move(engine: Engine, kind: Kind, before: Before, state: OpState) -> PoolMove | None:
    """None where nothing changes hands. Everything is looked at anew: the victim was observed off."""
    if state is not OpState.DONE or before.away is None:
        return None
    away = before.away
    if kind is Kind.RESUME:
        return PoolMove(back=away.vm_uuid, returns=away.returns, at=engine.clock())
    if kind is not Kind.INTERRUPT:
        return None
    observed, most = observe_all(engine.host), capacity(engine)
    return PoolMove(
        replace(away, out_at=engine.clock()),
        lambda ledger, demand: room_for(engine, most, engine.looked_again(ledger, observed), ledger, demand),
        at=engine.clock(),
    )
