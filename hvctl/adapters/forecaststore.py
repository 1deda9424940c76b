"""Forecasts that the node made and what came of them, in the database, and the arbiter's record of each resource."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, delete, func, insert, select, update

from hvctl.adapters.bulk import insert_rows
from hvctl.adapters.database import Database
from hvctl.adapters.forecasttables import FORECAST, STANDING
from hvctl.model.prediction import Prediction, Recorded

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

    def made(self, host: str, since: float, until: float, vm_uuid: str | None = None) -> list[Prediction]:
        """Those with since < made_at <= until, in the order of time."""
        query = select(*_FIELDS).where(
            FORECAST.c.host == host, FORECAST.c.made_at > int(since), FORECAST.c.made_at <= int(until)
        )
        if vm_uuid is not None:
            query = query.where(FORECAST.c.vm_uuid == vm_uuid)
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
            .values(actual_peak=bindparam("came"))
        )
        rows = [{"at": p.made_at, "whose": p.vm_uuid, "what": p.resource, "came": p.actual_peak} for p in known]
        with self._database.transaction(write=True) as connection:
            connection.execute(filled, rows)

    def prune(self, host: str, until: float) -> int:
        old = delete(FORECAST).where(FORECAST.c.host == host, FORECAST.c.made_at <= int(until))
        with self._database.transaction(write=True) as connection:
            return connection.execute(old).rowcount

    def standings(self, host: str) -> dict[str, Recorded]:
        """By resource."""
        query = select(*(STANDING.c[n] for n in Recorded._fields)).where(STANDING.c.host == host)
        with self._database.transaction(write=False) as connection:
            return {row.resource: Recorded(*row) for row in connection.execute(query)}

    def stand(self, host: str, records: Sequence[Recorded]) -> None:
        """Instead of what stood there of the same resources."""
        old = delete(STANDING).where(STANDING.c.host == host, STANDING.c.resource.in_([r.resource for r in records]))
        with self._database.transaction(write=True) as connection:
            connection.execute(old)
            for one in records:
                connection.execute(insert(STANDING).values(host=host, **one._asdict()))
