"""A host's reservations, the VMs that are away, and the limits that were set, in the journal's database: each change is
one transaction under the lock of the host's row, like every promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, delete, insert, select

from hvctl.adapters.store.database import Database
from hvctl.adapters.store.poolrows import (
    end_away,
    insert_away,
    insert_reservation,
    read_away,
    read_reservation,
    read_reservations,
    reservation_from,
    set_return,
    write_reservation,
)
from hvctl.adapters.store.pooltables import POOL, RESERVATION
from hvctl.adapters.store.rows import lock_host, read_ledger
from hvctl.codec import dump, load
from hvctl.decide.reservations import settled
from hvctl.errors import NotFoundError
from hvctl.model.allocation import Resources
from hvctl.model.host import Ledger
from hvctl.model.pool import Away, Held, Limits, Reservation

Grant = Callable[[Ledger, Reservation], Resources]
"""What of a reservation there is room for, itself left out of the ledger."""


@dataclass(frozen=True, slots=True)
class PoolMove:
    """What the end of an operation moves in the pool, in the transaction that ends it. away: the VM is away from now
    on, and the demand that it went for gets what `grant` sees free. back: the VM that is not away any more: what was
    kept for its return is its own now."""

    away: Away | None = None
    grant: Grant | None = None
    back: str | None = None
    returns: int | None = None
    at: float = 0.0


class PoolStore:
    """Store.pool; errors as Store's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reserve(
        self, host: str, asked: Sequence[Reservation], grant: Grant, key: str | None = None
    ) -> tuple[Reservation, ...]:
        """Make reservations, all or none: grant says what each gets, those before it counted, or raises why it does
        not fit. Those after a first one with an errand are for its victims' returns. With a key that was used before,
        that reservation is the answer and nothing is made."""
        with self._database.transaction(write=True) as connection:
            lock_host(connection, host)
            if key is not None:
                of_key = select(RESERVATION).where(RESERVATION.c.host == host, RESERVATION.c.key == key)
                if seen := connection.execute(of_key).first():
                    return (reservation_from(seen),)
            made: list[Reservation] = []
            for number, one in enumerate(asked):
                granted = grant(read_ledger(connection, host), one)
                new = replace(one, granted=granted, key=key if number == 0 else None)
                if made and made[0].errand is not None:
                    new = replace(new, demand=made[0].id)
                made.append(insert_reservation(connection, host, new))
            return tuple(made)

    def change(self, host: str, number: int, edit: Callable[[Reservation, Ledger], Reservation]) -> Reservation:
        """One reservation as `edit` makes it of what it is, and of the ledger without it; NotFoundError."""
        with self._database.transaction(write=True) as connection:
            lock_host(connection, host)
            found = read_reservation(connection, number)
            if found is None:
                raise _unknown(number)
            changed = edit(found, _without(read_ledger(connection, host), number))
            write_reservation(connection, changed)
            return changed

    def reservation(self, number: int) -> Reservation:
        """NotFoundError."""
        with self._database.transaction(write=False) as connection:
            found = read_reservation(connection, number)
        if found is None:
            raise _unknown(number)
        return found

    def reservations(self, host: str, *, ended: bool = False) -> tuple[Reservation, ...]:
        with self._database.transaction(write=False) as connection:
            return read_reservations(connection, host, ended=ended)

    def away(self, host: str, *, returned: bool = False) -> tuple[Away, ...]:
        """VMs that are to come back, the longest away first; returned: also those that did."""
        with self._database.transaction(write=False) as connection:
            return read_away(connection, host, returned=returned)

    def end_away(self, host: str, vm_uuid: str, at: float) -> None:
        with self._database.transaction(write=True) as connection:
            end_away(connection, host, vm_uuid, at)

    def return_now(self, host: str, demand: int, at: float) -> None:
        """Whoever went for a demand is due at `at`."""
        with self._database.transaction(write=True) as connection:
            set_return(connection, host, demand, at)

    def limits(self, host: str) -> Limits:
        with self._database.transaction(write=False) as connection:
            stored = connection.execute(select(POOL.c.limits).where(POOL.c.host == host)).scalar()
            return Limits() if stored is None else load(Limits, stored)

    def set_limits(self, host: str, limits: Limits) -> None:
        with self._database.transaction(write=True) as connection:
            lock_host(connection, host)
            connection.execute(delete(POOL).where(POOL.c.host == host))
            connection.execute(insert(POOL).values(host=host, limits=dump(limits)))


def apply_move(connection: Connection, host: str, move: PoolMove) -> None:
    """In a transaction that holds the host's lock, after the promise of the VM was written."""
    if move.back is not None:
        end_away(connection, host, move.back, move.at)
        for one in read_reservations(connection, host):
            if one.id == move.returns:
                looked = settled(one, Resources(), move.at)
                write_reservation(connection, replace(looked, state=Held.ENDED, closed_at=move.at))
    if move.away is None:
        return
    end_away(connection, host, move.away.vm_uuid, move.at)
    insert_away(connection, host, move.away)
    demand = None if move.away.demand is None else read_reservation(connection, move.away.demand)
    if demand is None or demand.state is Held.ENDED or move.grant is None:
        return
    granted = move.grant(_without(read_ledger(connection, host), demand.id), demand)
    granted = demand.granted.largest(granted).least(demand.size)
    whole = not (demand.size - granted).any
    state = Held.HELD if whole else demand.state
    errand = demand.errand
    if errand is not None:
        left = () if whole else tuple(v for v in errand.victims if v[0] != move.away.vm_uuid)
        errand = replace(errand, victims=left)
    write_reservation(connection, replace(demand, granted=granted, state=state, errand=errand))


def _unknown(number: int) -> NotFoundError:
    return NotFoundError(f"there is no reservation {number}.", "list them with: hvctl reserve list")


def _without(ledger: Ledger, number: int) -> Ledger:
    return replace(ledger, reservations=tuple(r for r in ledger.reservations if r.id != number))
