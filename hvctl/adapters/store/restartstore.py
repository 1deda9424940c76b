"""What VMs needed right after their starts, in the database: written once for each start and span."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, select, text

from hvctl.adapters.store.database import Database
from hvctl.adapters.store.sampletables import RESTART
from hvctl.adapters.store.tables import Document
from hvctl.model.restart import Restart

_NEW = text(
    "INSERT INTO restart (host, vm_uuid, at, span, image, gap, peak, mean, before)"
    " VALUES (:host, :vm_uuid, :at, :span, :image, :gap, :peak, :mean, :before) ON CONFLICT DO NOTHING"
).bindparams(*(bindparam(name, type_=Document) for name in ("peak", "mean", "before")))


class RestartStore:
    """The part of a Store that remembers restarts; errors as there."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, host: str, restarts: Sequence[Restart]) -> None:
        """One that is there already stays as it is."""
        if not restarts:
            return
        rows = [
            {
                "host": host,
                "vm_uuid": r.vm_uuid,
                "at": r.at,
                "span": r.span,
                "image": r.image,
                "gap": r.gap,
                "peak": dict(r.peak),
                "mean": dict(r.mean),
                "before": dict(r.before),
            }
            for r in restarts
        ]
        with self._database.transaction(write=True) as connection:
            connection.execute(_NEW, rows)

    def of(self, host: str, span: int | None = None, since: float = 0.0) -> list[Restart]:
        """Those of starts after `since`, in the order of time; span: of this many seconds only."""
        query = select(RESTART).where(RESTART.c.host == host, RESTART.c.at > since).order_by(RESTART.c.at)
        if span is not None:
            query = query.where(RESTART.c.span == span)
        with self._database.transaction(write=False) as connection:
            return [
                Restart(r.vm_uuid, r.image, r.at, r.gap, r.span, r.peak, r.mean, r.before)
                for r in connection.execute(query)
            ]
