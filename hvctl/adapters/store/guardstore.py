"""What guards remember and what they decided, in the journal's database. A decision to act is written before anything
is done, with the memory that it leaves, so that nobody acts twice on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from hvctl.adapters.store.database import Database
from hvctl.adapters.store.guardtables import DECISION, GUARD
from hvctl.codec import dump, load
from hvctl.errors import NotFoundError
from hvctl.model.guard import Decided, GuardState

LONGEST_RUN = 3600.0
"""Seconds that one row may stand for: an hour in which nothing was done is a row."""


class GuardStore:
    """Store.guards; errors as Store's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def state(self, host: str, vm_uuid: str) -> GuardState:
        query = select(GUARD.c.state).where(GUARD.c.host == host, GUARD.c.vm_uuid == vm_uuid)
        with self._database.transaction(write=False) as connection:
            stored = connection.execute(query).scalar()
            return GuardState() if stored is None else load(GuardState, stored)

    def remember(self, host: str, vm_uuid: str, state: GuardState | None) -> None:
        """None forgets it."""
        with self._database.transaction(write=True) as connection:
            _remember(connection, host, vm_uuid, state)

    def decided(self, host: str, one: Decided, state: GuardState) -> Decided:
        """Write a decision with what the guard remembers after it. Of the newest one of the VM it only prolongs the run
        where both are the same nothing, for the same reason and by the same policy."""
        with self._database.transaction(write=True) as connection:
            _remember(connection, host, one.vm_uuid, state)
            newest = _of(host).where(DECISION.c.vm_uuid == one.vm_uuid).order_by(DECISION.c.id.desc()).limit(1)
            row = connection.execute(newest).first()
            before = None if row is None else _read(row)
            if before is not None and _goes_on(before, one):
                longer = replace(
                    one, id=before.id, at=before.at, looks=before.looks + 1, most=before.most, most_at=before.most_at
                )
                if one.most > before.most:
                    longer = replace(longer, most=one.most, most_at=one.most_at)
                connection.execute(update(DECISION).where(DECISION.c.id == longer.id).values(_row(host, longer)))
                return longer
            new = insert(DECISION).values(_row(host, one)).returning(DECISION.c.id)
            return replace(one, id=connection.execute(new).scalar_one())

    def change(self, host: str, one: Decided) -> None:
        """Write what became of a decision."""
        with self._database.transaction(write=True) as connection:
            connection.execute(update(DECISION).where(DECISION.c.id == one.id).values(_row(host, one)))

    def decision(self, number: int) -> Decided:
        """NotFoundError."""
        found = self._all(_every().where(DECISION.c.id == number))
        if not found:
            raise NotFoundError(f"no guard has made a decision d{number}.", "hvctl guard status names the newest ones")
        return found[0]

    def of_operation(self, operation: int) -> Decided | None:
        """The decision that an operation was done for."""
        return next(iter(self._all(_every().where(DECISION.c.operation == operation))), None)

    def newest(self, host: str) -> dict[str, Decided]:
        """The last decision of each VM, by its uuid."""
        last = select(func.max(DECISION.c.id)).where(DECISION.c.host == host).group_by(DECISION.c.vm_uuid)
        return {d.vm_uuid: d for d in self._all(_every().where(DECISION.c.id.in_(last)))}

    def of_vm(self, host: str, vm_uuid: str, limit: int | None = None) -> list[Decided]:
        """Newest first."""
        query = _of(host).where(DECISION.c.vm_uuid == vm_uuid).order_by(DECISION.c.id.desc())
        return self._all(query.limit(limit))

    def pending(self, host: str) -> list[Decided]:
        """Those whose action nobody has seen the end of."""
        return self._all(_of(host).where(DECISION.c.pending).order_by(DECISION.c.id))

    def kept(self, host: str) -> list[Decided]:
        """Those for whose undo a snapshot is kept, newest first."""
        return self._all(_of(host).where(DECISION.c.kept_until.is_not(None)).order_by(DECISION.c.id.desc()))

    def prune(self, host: str, until: float) -> int:
        """Remove decisions up to a time (those that are not over stay), and what is remembered of VMs that have none;
        how many decisions."""
        over = (
            DECISION.c.host == host,
            DECISION.c.until <= until,
            ~DECISION.c.pending,
            DECISION.c.kept_until.is_(None),
        )
        with self._database.transaction(write=True) as connection:
            gone = connection.execute(delete(DECISION).where(*over)).rowcount
            known = select(DECISION.c.vm_uuid).where(DECISION.c.host == host)
            connection.execute(delete(GUARD).where(GUARD.c.host == host, GUARD.c.vm_uuid.not_in(known)))
            return gone

    def _all(self, query: Select[Any]) -> list[Decided]:
        with self._database.transaction(write=False) as connection:
            return [_read(row) for row in connection.execute(query)]


def _every() -> Select[Any]:
    return select(DECISION.c.id, DECISION.c.document)


def _of(host: str) -> Select[Any]:
    return _every().where(DECISION.c.host == host)


def _read(row: Any) -> Decided:
    return replace(load(Decided, row.document), id=row.id)


def _row(host: str, one: Decided) -> dict[str, Any]:
    return {
        "host": host,
        "vm_uuid": one.vm_uuid,
        "until": one.until,
        "pending": one.decision.chosen is not None and one.outcome is None,
        "kept_until": one.kept_until,
        "operation": one.operation,
        "document": dump(one),
    }


def _remember(connection: Connection, host: str, vm_uuid: str, state: GuardState | None) -> None:
    connection.execute(delete(GUARD).where(GUARD.c.host == host, GUARD.c.vm_uuid == vm_uuid))
    if state is not None:
        connection.execute(insert(GUARD).values(host=host, vm_uuid=vm_uuid, state=dump(state)))


def _goes_on(before: Decided, now: Decided) -> bool:
    alike = before.decision.verdict == now.decision.verdict and before.watch == now.watch
    same = set(before.decision.memory.pressed) == set(now.decision.memory.pressed)
    return now.decision.chosen is None and alike and same and 0 <= now.at - before.at < LONGEST_RUN
