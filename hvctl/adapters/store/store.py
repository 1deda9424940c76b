"""The journal of operations, and what every VM of a host was promised: each change of either is one transaction.

The rules that hold whatever the number of hvctl processes: at most one open operation per VM, and nothing is promised
that the admission check did not see fit, because both are decided under the lock of the host's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import delete, insert, select, update

from hvctl.adapters.store import schema
from hvctl.adapters.store.database import Database
from hvctl.adapters.store.forecaststore import Forecasts
from hvctl.adapters.store.guardstore import GuardStore
from hvctl.adapters.store.jobruns import JobRuns
from hvctl.adapters.store.poolstore import PoolMove, PoolStore, apply_move
from hvctl.adapters.store.restartstore import RestartStore
from hvctl.adapters.store.rows import (
    COUNTED,
    IS_OPEN,
    JOURNAL,
    PROMISES,
    append_steps,
    lock_host,
    operation_from,
    promise_from,
    read_ledger,
    read_steps,
    row_of,
)
from hvctl.adapters.store.samples import Samples
from hvctl.adapters.store.tables import HOST, OPERATION, VM
from hvctl.codec import dump, load
from hvctl.errors import BusyError, HvctlError, NotFoundError
from hvctl.model.allocation import Record, Resources
from hvctl.model.host import Forget, Ledger, Promise
from hvctl.model.operation import Kind, Operation, OpState, StepRecord


class Store:
    """One database; connects when it is first used, and may be shared by threads. Every method raises
    UnreachableError (cannot be opened, damaged, full) or BusyError (locked for 5 s) on top of what it says."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self.samples = Samples(self._database)
        self.jobs = JobRuns(self._database)
        self.restarts = RestartStore(self._database)
        self.pool = PoolStore(self._database)
        self.forecasts = Forecasts(self._database)
        self.guards = GuardStore(self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def migrate(self) -> None:
        """Bring the schema to this code's; cheap when it is there already. RefusedError if it is newer."""
        schema.migrate(self._database)

    def check_schema(self) -> None:
        """RefusedError unless the schema is this code's; changes nothing."""
        schema.check_schema(self._database)

    def check_writable(self) -> None:
        """UnreachableError if nothing could be written now, as on a file system that an error made read-only; BusyError
        if another process writes for longer than anybody waits."""
        with self._database.transaction(write=True) as connection:
            # SQLite finds out only when it is to change something.
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = version_num")

    # --- the journal

    def open_operation(
        self,
        *,
        vm_uuid: str,
        vm_name: str,
        host: str,
        kind: Kind,
        request: dict[str, Any],
        before: dict[str, Any],
        who: str,
        boot_id: str,
        key: str | None = None,
        admit: Callable[[Ledger], None] | None = None,
        held: Resources | None = None,
    ) -> Operation:
        """Write the row that makes this operation the VM's only one, holding `held` of the host until it is closed.

        With a key that this host has seen before, the answer is that operation, in whatever state and of whatever VM,
        and nothing is written. BusyError if the VM has an open operation; `admit` raises why the request does not fit.
        """
        with self._database.transaction(write=True) as connection:
            lock_host(connection, host)
            if key is not None:
                of_key = select(*JOURNAL).where(OPERATION.c.host == host, OPERATION.c.key == key)
                if seen := connection.execute(of_key).first():
                    return operation_from(seen, read_steps(connection, seen.id))
            of_vm = select(*JOURNAL).where(IS_OPEN, OPERATION.c.host == host, OPERATION.c.vm_uuid == vm_uuid)
            if other := connection.execute(of_vm).first():
                raise _busy(operation_from(other))
            if admit is not None:
                admit(read_ledger(connection, host))
            operation = Operation(
                0, vm_uuid, vm_name, kind, OpState.OPEN, request, before, who, host, boot_id, _now(), key=key
            )
            number = connection.execute(insert(OPERATION).values(row_of(operation, held)).returning(OPERATION.c.id))
            operation = replace(operation, id=number.scalar_one())
            connection.execute(update(HOST).where(HOST.c.name == host).values(generation=HOST.c.generation + 1))
        return operation

    def append_steps(self, operation: int, steps: Sequence[StepRecord]) -> None:
        """Add to the journal of an operation, whatever its state, after the steps it has."""
        with self._database.transaction(write=True) as connection:
            append_steps(connection, operation, steps)

    def close_operation(
        self,
        operation: int,
        state: OpState,
        *,
        reason: str | None = None,
        result: dict[str, Any] | None = None,
        steps: Sequence[StepRecord] = (),
        promise: Promise | Forget | None = None,
        record: Record | None = None,
        move: PoolMove | None = None,
    ) -> None:
        """End an operation, journal its steps and write what its VM is promised from now on (None: as before), with
        the record that says so in full, and what changes hands in the pool. Closing again with the same state
        changes nothing."""
        if state is OpState.OPEN:
            raise ValueError("an operation cannot be closed as open")
        with self._database.transaction(write=True) as connection:
            closing = (
                update(OPERATION)
                .where(OPERATION.c.id == operation, OPERATION.c.state == OpState.OPEN.value)
                .values(state=state.value, closed_at=_now(), reason=reason, result=result)
                .returning(OPERATION.c.host, OPERATION.c.vm_uuid)
            )
            if move is not None:
                host = select(OPERATION.c.host).where(OPERATION.c.id == operation)
                lock_host(connection, connection.execute(host).scalar_one())
            closed = connection.execute(closing).first()
            if closed is None:
                ended = connection.execute(select(OPERATION.c.state).where(OPERATION.c.id == operation)).scalar()
                if ended is None:
                    raise _unknown(operation)
                if ended != state.value:
                    raise HvctlError(
                        f"operation {operation} ended as {ended} already, so it cannot end as {state}.",
                        f"see it with: hvctl operation show {operation}",
                    )
                return
            append_steps(connection, operation, steps)
            if promise is not None:
                connection.execute(delete(VM).where(VM.c.host == closed.host, VM.c.uuid == closed.vm_uuid))
            if isinstance(promise, Promise):
                counted = {n: getattr(promise.resources, n) for n in COUNTED}
                connection.execute(
                    insert(VM).values(
                        host=closed.host,
                        uuid=closed.vm_uuid,
                        name=promise.vm_name,
                        record=None if record is None else dump(record),
                        holds=promise.holds,
                        **counted,
                    )
                )
            if move is not None:
                apply_move(connection, closed.host, move)

    def operation(self, operation: int) -> Operation:
        """One operation with its steps; NotFoundError."""
        with self._database.transaction(write=False) as connection:
            row = connection.execute(select(*JOURNAL).where(OPERATION.c.id == operation)).first()
            if row is None:
                raise _unknown(operation)
            return operation_from(row, read_steps(connection, operation))

    def operations(
        self,
        host: str | None = None,
        vm_uuid: str | None = None,
        state: OpState | None = None,
        limit: int | None = None,
        vm_name: str | None = None,
    ) -> tuple[Operation, ...]:
        """Operations without their steps, newest first. vm_name is the name that the VM had then."""
        query = select(*JOURNAL).order_by(OPERATION.c.id.desc()).limit(limit)
        for column, wanted in (
            ("host", host),
            ("vm_uuid", vm_uuid),
            ("vm_name", vm_name),
            ("state", state and state.value),
        ):
            if wanted is not None:
                query = query.where(OPERATION.c[column] == wanted)
        with self._database.transaction(write=False) as connection:
            return tuple(operation_from(row) for row in connection.execute(query))

    def operation_of_key(self, host: str, key: str) -> Operation | None:
        """The operation that an idempotency key was used for, with its steps."""
        query = select(*JOURNAL).where(OPERATION.c.host == host, OPERATION.c.key == key)
        with self._database.transaction(write=False) as connection:
            row = connection.execute(query).first()
            return None if row is None else operation_from(row, read_steps(connection, row.id))

    def closed_since(self, host: str, since: str) -> tuple[Operation, ...]:
        """Operations that were closed at or after an RFC 3339 time, the oldest first."""
        closed = select(*JOURNAL).where(OPERATION.c.host == host, OPERATION.c.closed_at >= since)
        with self._database.transaction(write=False) as connection:
            rows = connection.execute(closed.order_by(OPERATION.c.closed_at, OPERATION.c.id))
            return tuple(operation_from(row) for row in rows)

    def open_operations(self, host: str) -> tuple[Operation, ...]:
        return self.operations(host, state=OpState.OPEN)

    # --- what is promised

    def ledger(self, host: str) -> Ledger:
        """What admission would see now. Only the one that open_operation hands to `admit` stays true while you look."""
        with self._database.transaction(write=False) as connection:
            return read_ledger(connection, host)

    def promises(self, host: str) -> tuple[Promise, ...]:
        """What is promised when no operation is open, by name."""
        query = PROMISES.where(VM.c.host == host).order_by(VM.c.name, VM.c.uuid)
        with self._database.transaction(write=False) as connection:
            return tuple(promise_from(row) for row in connection.execute(query))

    def promise_of(self, host: str, vm_uuid: str) -> Promise | None:
        query = PROMISES.where(VM.c.host == host, VM.c.uuid == vm_uuid)
        with self._database.transaction(write=False) as connection:
            row = connection.execute(query).first()
            return None if row is None else promise_from(row)

    def records(self, host: str) -> dict[str, Record]:
        """By uuid, of the VMs that were promised something."""
        query = select(VM.c.uuid, VM.c.record).where(VM.c.host == host)
        with self._database.transaction(write=False) as connection:
            return {r.uuid: load(Record, r.record) for r in connection.execute(query) if r.record is not None}

    def record_of(self, host: str, vm_uuid: str) -> Record | None:
        """The record of a VM's promise, to compare with the one in the domain's metadata."""
        query = select(VM.c.record).where(VM.c.host == host, VM.c.uuid == vm_uuid)
        with self._database.transaction(write=False) as connection:
            stored = connection.execute(query).scalar()
            return None if stored is None else load(Record, stored)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _busy(other: Operation) -> BusyError:
    return BusyError(
        f"VM {other.vm_name} has an open operation: {other.kind} {other.id}, by {other.who} since {other.opened_at}.",
        f"wait for it, or see: hvctl operation show {other.id}; if its owner died: hvctl recover",
    )


def _unknown(operation: int) -> NotFoundError:
    return NotFoundError(f"there is no operation {operation}.", "list them with: hvctl operation list")
