"""Forecasts that the node made and what came of them, in the database, with what was learned: the arbiter's record of
each resource and target, and the margins of whoever answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, Table, bindparam, delete, func, select, update

from hvctl.adapters.store.bulk import insert_rows
from hvctl.adapters.store.database import Database
from hvctl.adapters.store.forecasttables import FLEET_MARGIN, FORECAST, STANDING, VM_MARGIN
from hvctl.model.prediction import FleetMargin, Prediction, Recorded, VmMargin

_LISTED: Final = 100  # VMs that are asked for by name; of more, those of all are read
_FIELDS = tuple(FORECAST.c[n] for n in Prediction._fields)


class Forecasts:
    """The part of a Store that holds forecasts; errors as there."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, host: str, made: Sequence[Prediction]) -> None:
        """All or none; what was forecast for the same time before stays as it is."""
        with self._database.transaction(write=True) as connection:
            insert_rows(connection, FORECAST, [(host, *one) for one in made])

    def newest(self, host: str, since: float, until: float) -> list[Prediction]:
        """Those of the last time at which any were made, if that is after `since` and not after `until`."""
        last = select(func.max(FORECAST.c.made_at)).where(
            FORECAST.c.host == host, FORECAST.c.made_at > int(since), FORECAST.c.made_at <= int(until)
        )
        query = select(*_FIELDS).where(FORECAST.c.host == host, FORECAST.c.made_at == last.scalar_subquery())
        with self._database.transaction(write=False) as connection:
            return [Prediction(*row) for row in connection.execute(query)]

    def made(
        self, host: str, since: float, until: float, vm_uuid: str | None = None, *, awaited: bool = False
    ) -> list[Prediction]:
        """Those with since < made_at <= until, in the order of time. awaited: of which nobody knows yet what came."""
        query = select(*_FIELDS).where(
            FORECAST.c.host == host, FORECAST.c.made_at > int(since), FORECAST.c.made_at <= int(until)
        )
        if vm_uuid is not None:
            query = query.where(FORECAST.c.vm_uuid == vm_uuid)
        if awaited:
            query = query.where(FORECAST.c.actual_peak.is_(None))
        with self._database.transaction(write=False) as connection:
            return [Prediction(*row) for row in connection.execute(query.order_by(FORECAST.c.made_at))]

    def come(self, host: str, known: Sequence[Prediction]) -> None:
        """Write what came of these."""
        if not known:
            return
        filled = (
            update(FORECAST)
            .where(
                FORECAST.c.host == host,
                FORECAST.c.made_at == bindparam("at"),
                FORECAST.c.vm_uuid == bindparam("whose"),
                FORECAST.c.resource == bindparam("what"),
            )
            .values(actual_peak=bindparam("peaked"), actual_mean=bindparam("lasted"))
        )
        rows = [
            {"at": p.made_at, "whose": p.vm_uuid, "what": p.resource, "peaked": p.actual_peak, "lasted": p.actual_mean}
            for p in known
        ]
        with self._database.transaction(write=True) as connection:
            connection.execute(filled, rows)

    def prune(self, host: str, until: float) -> int:
        old = delete(FORECAST).where(FORECAST.c.host == host, FORECAST.c.made_at <= int(until))
        with self._database.transaction(write=True) as connection:
            return connection.execute(old).rowcount

    def standings(self, host: str) -> dict[tuple[str, str], Recorded]:
        """By resource and target."""
        query = select(*(STANDING.c[n] for n in Recorded._fields)).where(STANDING.c.host == host)
        with self._database.transaction(write=False) as connection:
            return {(row.resource, row.target): Recorded(*row) for row in connection.execute(query)}

    def fleet_margins(self, host: str, model_name: str) -> list[FleetMargin]:
        """While this set of models is in use."""
        query = select(*(FLEET_MARGIN.c[n] for n in FleetMargin._fields)).where(
            FLEET_MARGIN.c.host == host, FLEET_MARGIN.c.model_name == model_name
        )
        with self._database.transaction(write=False) as connection:
            return [FleetMargin(*row) for row in connection.execute(query)]

    def vm_margins(self, host: str, model_name: str, vm_uuids: Sequence[str] | None = None) -> list[VmMargin]:
        """Those of these VMs, and perhaps of others; None: of all."""
        query = select(*(VM_MARGIN.c[n] for n in VmMargin._fields)).where(
            VM_MARGIN.c.host == host, VM_MARGIN.c.model_name == model_name
        )
        if vm_uuids is not None and len(vm_uuids) <= _LISTED:
            query = query.where(VM_MARGIN.c.vm_uuid.in_(list(vm_uuids)))
        with self._database.transaction(write=False) as connection:
            return [VmMargin(*row) for row in connection.execute(query)]

    def learn(
        self, host: str, standings: Sequence[Recorded], fleet: Sequence[FleetMargin], vms: Sequence[VmMargin]
    ) -> None:
        """All or none, each instead of what stood there with the same key."""
        with self._database.transaction(write=True) as connection:
            _replace(connection, STANDING, host, standings)
            _replace(connection, FLEET_MARGIN, host, fleet)
            _replace(connection, VM_MARGIN, host, vms)

    def forget(self, host: str, until: float) -> None:
        """The margins of VMs and sets of models from which nothing was learned after that time."""
        with self._database.transaction(write=True) as connection:
            for table in (FLEET_MARGIN, VM_MARGIN):
                connection.execute(delete(table).where(table.c.host == host, table.c.learned_at <= int(until)))


def _replace(
    connection: Connection, table: Table, host: str, records: Sequence[Recorded | FleetMargin | VmMargin]
) -> None:
    if not records:
        return
    keys = [c.name for c in table.primary_key.columns if c.name != "host"]
    same = (table.c[name] == bindparam(f"old_{name}") for name in keys)
    old = delete(table).where(table.c.host == host, *same)
    connection.execute(old, [{f"old_{name}": getattr(r, name) for name in keys} for r in records])
    # The fields of a record are the columns after the host, in their order.
    insert_rows(connection, table, [(host, *one) for one in records])
