"""Between the rows of the database and the nouns of the model: the statements that store.py puts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, func, insert, literal, select, text, union_all

from hvctl.adapters.store.poolrows import read_reservations
from hvctl.adapters.store.tables import HOST, OPERATION, STEP, VM
from hvctl.errors import HvctlError
from hvctl.model.allocation import Resources
from hvctl.model.host import Ledger, Promise
from hvctl.model.operation import Kind, Operation, OpState, StepRecord

JOURNAL = [c for c in OPERATION.c if not c.name.startswith("held_")]
COUNTED = ("cpu", "memory", "network", "iops")
IS_OPEN = text("state = 'open'")
PROMISES = select(VM.c.uuid, VM.c.name, *(VM.c[n] for n in COUNTED), VM.c.holds, literal(False).label("open"))
_OPEN = select(
    OPERATION.c.vm_uuid,
    OPERATION.c.vm_name,
    *(OPERATION.c[f"held_{n}"] for n in COUNTED),
    literal(True),
    literal(True),
).where(IS_OPEN)


def lock_host(connection: Connection, host: str) -> None:
    # SQLite's writing transaction is exclusive already and ignores FOR UPDATE. key_share: rows that name this host
    # as their parent may be written meanwhile.
    query = select(HOST.c.name).where(HOST.c.name == host).with_for_update(key_share=True)
    if connection.execute(query).first() is None:
        new = text("INSERT INTO host (name, generation) VALUES (:host, 0) ON CONFLICT DO NOTHING")
        connection.execute(new, {"host": host})
        connection.execute(query)


def read_ledger(connection: Connection, host: str) -> Ledger:
    # One statement, so one view: between two, an operation that closes could turn up in neither.
    query = union_all(PROMISES.where(VM.c.host == host), _OPEN.where(OPERATION.c.host == host))
    rows = connection.execute(query).all()
    promised = {row.uuid: promise_from(row) for row in rows if not row.open}
    for row in rows:
        if not row.open:
            continue
        before = promised.get(row.uuid)
        if row.cpu is not None:
            held = _resources(row)
            largest = held if before is None else held.largest(before.resources)
            promised[row.uuid] = Promise(row.uuid, row.name, largest, holds=True, busy=True)
        elif before is not None:
            promised[row.uuid] = replace(before, busy=True)
    # Read after the promises: what moves from a promise to a reservation in between is then counted twice, not never.
    reservations = read_reservations(connection, host)
    return Ledger(tuple(sorted(promised.values(), key=lambda p: (p.vm_name, p.vm_uuid))), reservations)


def _resources(row: Any) -> Resources:
    return Resources(row.cpu, row.memory, row.network, row.iops)


def promise_from(row: Any) -> Promise:
    return Promise(row.uuid, row.name, _resources(row), row.holds)


def operation_from(row: Any, steps: tuple[StepRecord, ...] = ()) -> Operation:
    # By hand, not by the codec: its schema of an Operation takes longer to build than the whole operation to journal.
    fields: dict[str, Any] = dict(row._mapping)
    try:
        kind, state = Kind(fields.pop("kind")), OpState(fields.pop("state"))
    except ValueError as e:
        raise HvctlError(f"operation {row.id} is none that this hvctl knows: {e}.", "upgrade hvctl here") from e
    return Operation(**fields, kind=kind, state=state, steps=steps)


def row_of(operation: Operation, held: Resources | None) -> dict[str, Any]:
    """The row of a new operation; the database gives it its id."""
    row = {c.name: getattr(operation, c.name) for c in JOURNAL if c.name != "id"}
    row |= {f"held_{n}": None if held is None else getattr(held, n) for n in COUNTED}
    return row | {"kind": operation.kind.value, "state": operation.state.value}


def read_steps(connection: Connection, operation: int) -> tuple[StepRecord, ...]:
    query = select(STEP).where(STEP.c.operation_id == operation).order_by(STEP.c.seq)
    return tuple(
        StepRecord(row.name, row.detail, row.seconds, row.outcome, row.facts) for row in connection.execute(query)
    )


def append_steps(connection: Connection, operation: int, steps: Sequence[StepRecord]) -> None:
    if not steps:
        return
    last = select(func.coalesce(func.max(STEP.c.seq), 0)).where(STEP.c.operation_id == operation)
    first = connection.execute(last).scalar_one() + 1
    rows = [
        {
            "operation_id": operation,
            "seq": seq,
            "name": step.name,
            "detail": step.detail,
            "seconds": step.seconds,
            "outcome": step.outcome,
            "facts": step.facts,
        }
        for seq, step in enumerate(steps, start=first)
    ]
    connection.execute(insert(STEP), rows)
