"""Between the rows of a host's pool and the nouns of the model; used by the store and by what stands beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, insert, select, update

from hvctl.adapters.store.pooltables import AWAY, RESERVATION
from hvctl.codec import dump, load
from hvctl.model.allocation import Resources
from hvctl.model.pool import Away, Errand, Held, Reservation

_COUNTED = ("cpu", "memory", "network", "iops")
_VECTORS = ("size", "granted", "used")
_PLAIN = (
    "owner", "reason", "starts_at", "ends_at", "half_life", "idle_since", "accounted_at", "made_at", "closed_at", "who",
    "key", "demand", "reserved_seconds", "used_seconds",
)  # fmt: skip


def reservation_from(row: Any) -> Reservation:
    vectors: dict[str, Any] = {v: Resources(*(getattr(row, f"{v}_{n}") for n in _COUNTED)) for v in _VECTORS}
    errand = None if row.errand is None else load(Errand, row.errand)
    return Reservation(
        id=row.id, state=Held(row.state), errand=errand, **vectors, **{n: getattr(row, n) for n in _PLAIN}
    )


def row_of(reservation: Reservation) -> dict[str, Any]:
    row = {n: getattr(reservation, n) for n in _PLAIN}
    row |= {f"{v}_{n}": getattr(getattr(reservation, v), n) for v in _VECTORS for n in _COUNTED}
    errand = None if reservation.errand is None else dump(reservation.errand)
    return row | {"state": reservation.state.value, "errand": errand}


def read_reservations(connection: Connection, host: str, *, ended: bool = False) -> tuple[Reservation, ...]:
    query = select(RESERVATION).where(RESERVATION.c.host == host).order_by(RESERVATION.c.id)
    if not ended:
        query = query.where(RESERVATION.c.state != Held.ENDED.value)
    return tuple(reservation_from(row) for row in connection.execute(query))


def read_reservation(connection: Connection, number: int) -> Reservation | None:
    row = connection.execute(select(RESERVATION).where(RESERVATION.c.id == number)).first()
    return None if row is None else reservation_from(row)


def insert_reservation(connection: Connection, host: str, reservation: Reservation) -> Reservation:
    new = insert(RESERVATION).values(host=host, **row_of(reservation)).returning(RESERVATION.c.id)
    return replace(reservation, id=connection.execute(new).scalar_one())


def write_reservation(connection: Connection, reservation: Reservation) -> None:
    connection.execute(update(RESERVATION).where(RESERVATION.c.id == reservation.id).values(row_of(reservation)))


def away_from(row: Any) -> Away:
    return replace(load(Away, row.document), id=row.id, returned_at=row.returned_at, return_at=row.return_at)


def read_away(connection: Connection, host: str, *, returned: bool = False) -> tuple[Away, ...]:
    query = select(AWAY).where(AWAY.c.host == host).order_by(AWAY.c.id)
    if not returned:
        query = query.where(AWAY.c.returned_at.is_(None))
    return tuple(away_from(row) for row in connection.execute(query))


def insert_away(connection: Connection, host: str, away: Away) -> int:
    row = {n: getattr(away, n) for n in ("vm_uuid", "demand", "out_at", "return_at")}
    new = insert(AWAY).values(host=host, returned_at=None, document=dump(away), **row).returning(AWAY.c.id)
    return int(connection.execute(new).scalar_one())


def set_return(connection: Connection, host: str, demand: int, at: float) -> None:
    of_demand = (AWAY.c.host == host, AWAY.c.demand == demand, AWAY.c.returned_at.is_(None))
    connection.execute(update(AWAY).where(*of_demand).values(return_at=at))


def end_away(connection: Connection, host: str, vm_uuid: str, at: float) -> None:
    of_vm = (AWAY.c.host == host, AWAY.c.vm_uuid == vm_uuid, AWAY.c.returned_at.is_(None))
    connection.execute(update(AWAY).where(*of_vm).values(returned_at=at))
