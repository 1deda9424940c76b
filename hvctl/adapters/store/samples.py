"""What VMs used, in the database: raw samples and rolled-up ones in, series out, and what is too old away."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, exists, func, select, text, update

from hvctl.adapters.store.bulk import insert_rows
from hvctl.adapters.store.database import Database
from hvctl.adapters.store.sampletables import COLLECTOR, OBSERVED_VM, RAW_SAMPLE, ROLLED_SAMPLE, VM_EVENT
from hvctl.adapters.store.tables import VM, Words, as_text
from hvctl.decide.rollup import SLOT, last_full_slot, roll_up, slot
from hvctl.model.sample import ROLLED_COLUMNS, STORED, Sample, VmEvent

AT_ONCE = 1000
"""VMs whose raw samples of a slot are in memory at the same time."""

JOB_TYPE = "job-type"
"""The label of a VM that says what kind of job it runs."""

_HEAD = len(("uuid", "name", "at"))
_FIRST = text("INSERT INTO collector (host, rolled_until) VALUES (:host, :until) ON CONFLICT DO NOTHING")
_NEW = text("INSERT INTO observed_vm (host, uuid, name) VALUES (:host, :uuid, :name) ON CONFLICT DO NOTHING")

# What the journal says happened is said once, whoever reads it twice.
_EVENT = text(
    "INSERT INTO vm_event (host, vm_uuid, vm_name, kind, at, detail, operation)"
    " VALUES (:host, :vm_uuid, :vm_name, :kind, :at, :detail, :operation) ON CONFLICT DO NOTHING"
).bindparams(bindparam("vm_name", type_=Words), bindparam("detail", type_=Words))


class Samples:
    """The part of a Store that holds use over time; errors as there. at is whole seconds since 1970 everywhere."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._ids: dict[str, dict[str, tuple[int, str]]] = {}

    # --- in

    def add(
        self, host: str, samples: Sequence[Sample], events: Sequence[VmEvent] = (), now: float | None = None
    ) -> None:
        """Samples and events of one or several cycles, all or none. now: when samples older than the last full slot
        are late, and that slot is rolled up again."""
        if not samples and not events:
            return
        with self._database.transaction(write=True) as connection:
            ids = self._known(connection, host, {s[0]: as_text(s[1]) for s in samples})
            # (at, vm, *STORED): the fields of a Sample in their order, without whose it is and what is not stored.
            rows = [(s[2], ids[s[0]][0], *s[_HEAD:-1]) for s in samples]
            insert_rows(connection, RAW_SAMPLE, rows)
            if events:
                connection.execute(_EVENT, [_event_row(host, e) for e in events])
            oldest = min((s.at for s in samples), default=None)
            if now is not None and oldest is not None and slot(oldest) <= last_full_slot(now):
                until = slot(oldest)
                late = update(COLLECTOR).where(COLLECTOR.c.host == host, COLLECTOR.c.rolled_until > until)
                connection.execute(late.values(rolled_until=until))
        with self._lock:
            self._ids[host] = ids

    def _known(self, connection: Connection, host: str, names: Mapping[str, str]) -> dict[str, tuple[int, str]]:
        """The number and the name of each VM, those of before included; new ones get a number, renamed ones a name."""
        with self._lock:
            known = self._ids.get(host)
        if known is not None and all(u in known and known[u][1] == n for u, n in names.items()):
            return known
        known = self._read_ids(connection, host)
        missing = [{"host": host, "uuid": u, "name": n} for u, n in names.items() if u not in known]
        if missing:
            connection.execute(_NEW, missing)
        for uuid, name in names.items():
            if uuid in known and known[uuid][1] != name:
                renamed = update(OBSERVED_VM).where(OBSERVED_VM.c.id == known[uuid][0]).values(name=name)
                connection.execute(renamed)
        return self._read_ids(connection, host)

    @staticmethod
    def _read_ids(connection: Connection, host: str) -> dict[str, tuple[int, str]]:
        query = select(OBSERVED_VM.c.uuid, OBSERVED_VM.c.id, OBSERVED_VM.c.name).where(OBSERVED_VM.c.host == host)
        return {uuid: (number, name) for uuid, number, name in connection.execute(query)}

    # --- rolled up

    def roll_up(self, host: str, now: float) -> int:
        """Every slot that is over and not rolled up yet; how many rows they gave. Repeatable: a slot is made anew."""
        made = 0
        for start in self._slots(host, last_full_slot(now)):
            made += self._roll_slot(host, start)
        self._label(host)
        return made

    def _slots(self, host: str, last: int) -> Iterator[int]:
        """Starts of the slots to roll up, each marked as done when the next one is asked for."""
        with self._database.transaction(write=False) as connection:
            done = connection.execute(select(COLLECTOR.c.rolled_until).where(COLLECTOR.c.host == host)).scalar()
        while True:
            oldest = select(func.min(RAW_SAMPLE.c.at)).where(RAW_SAMPLE.c.vm.in_(_of(host)))
            if done is not None:
                oldest = oldest.where(RAW_SAMPLE.c.at > done)
            with self._database.transaction(write=False) as connection:
                first = connection.execute(oldest).scalar()
            start = last + SLOT if first is None else slot(first)
            if start > last:
                return
            yield start
            done = start + SLOT
            with self._database.transaction(write=True) as connection:
                connection.execute(_FIRST, {"host": host, "until": done})
                connection.execute(update(COLLECTOR).where(COLLECTOR.c.host == host).values(rolled_until=done))

    def _roll_slot(self, host: str, start: int) -> int:
        within = (RAW_SAMPLE.c.at > start, RAW_SAMPLE.c.at <= start + SLOT)
        seen = select(RAW_SAMPLE.c.vm).where(*within, RAW_SAMPLE.c.vm.in_(_of(host))).distinct()
        with self._database.transaction(write=False) as connection:
            vms = sorted(connection.execute(seen).scalars())
        made = 0
        for i in range(0, len(vms), AT_ONCE):
            low, high = vms[i], vms[min(i + AT_ONCE, len(vms)) - 1]
            of_these = (RAW_SAMPLE.c.vm.between(low, high), RAW_SAMPLE.c.vm.in_(_of(host)))
            with self._database.transaction(write=False) as connection:
                rows = connection.execute(select(*RAW_SAMPLE.c).where(*within, *of_these)).all()
            rolled = list(roll_up(rows))
            old = delete(ROLLED_SAMPLE).where(
                ROLLED_SAMPLE.c.at == start, ROLLED_SAMPLE.c.vm.between(low, high), ROLLED_SAMPLE.c.vm.in_(_of(host))
            )
            with self._database.transaction(write=True) as connection:
                connection.execute(old)
                insert_rows(connection, ROLLED_SAMPLE, rolled)
            made += len(rolled)
        return made

    def _label(self, host: str) -> None:
        """Take over what kind of job each VM is labelled with."""
        said = select(OBSERVED_VM.c.id, OBSERVED_VM.c.job_type, VM.c.record).join(
            VM, (VM.c.host == OBSERVED_VM.c.host) & (VM.c.uuid == OBSERVED_VM.c.uuid)
        )
        with self._database.transaction(write=False) as connection:
            rows = connection.execute(said.where(OBSERVED_VM.c.host == host)).all()
        labelled = [(row.id, ((row.record or {}).get("labels") or {}).get(JOB_TYPE), row.job_type) for row in rows]
        changed = [(number, now) for number, now, before in labelled if now != before]
        if changed:
            with self._database.transaction(write=True) as connection:
                for number, kind in changed:
                    connection.execute(update(OBSERVED_VM).where(OBSERVED_VM.c.id == number).values(job_type=kind))

    def prune(self, host: str, raw_until: int, rolled_until: int) -> int:
        """Remove samples and events up to these times, an hour of raw ones at a time so that nobody waits long; how
        many. VMs of which nothing is left are forgotten."""
        gone = 0
        for table, until, step in ((RAW_SAMPLE, raw_until, 3600), (ROLLED_SAMPLE, rolled_until, 86400)):
            while True:
                oldest = select(func.min(table.c.at)).where(table.c.vm.in_(_of(host)))
                with self._database.transaction(write=True) as connection:
                    first = connection.execute(oldest).scalar()
                    if first is None or first > until:
                        break
                    old = delete(table).where(table.c.at <= min(until, first + step), table.c.vm.in_(_of(host)))
                    gone += connection.execute(old).rowcount
        with self._database.transaction(write=True) as connection:
            old = delete(VM_EVENT).where(VM_EVENT.c.host == host, VM_EVENT.c.at <= rolled_until)
            gone += connection.execute(old).rowcount
            left = (exists().where(t.c.vm == OBSERVED_VM.c.id) for t in (ROLLED_SAMPLE, RAW_SAMPLE))
            connection.execute(delete(OBSERVED_VM).where(OBSERVED_VM.c.host == host, *(~found for found in left)))
        with self._lock:
            self._ids.pop(host, None)
        return gone

    # --- out

    def latest(self, host: str, since: int, uuids: Sequence[str] | None = None) -> list[Sample]:
        """Raw samples that ended after `since`, in the order of time; of these VMs only, if they are named."""
        query = (
            select(OBSERVED_VM.c.uuid, OBSERVED_VM.c.name, RAW_SAMPLE.c.at, *(RAW_SAMPLE.c[n] for n in STORED))
            .join(OBSERVED_VM, OBSERVED_VM.c.id == RAW_SAMPLE.c.vm)
            .where(OBSERVED_VM.c.host == host, RAW_SAMPLE.c.at > since)
            .order_by(RAW_SAMPLE.c.at)
        )
        if uuids is not None:
            query = query.where(OBSERVED_VM.c.uuid.in_(list(uuids)))
        with self._database.transaction(write=False) as connection:
            return [Sample(*row) for row in connection.execute(query)]

    def series(
        self,
        since: int,
        until: int,
        *,
        host: str | None = None,
        uuids: Sequence[str] | None = None,
        columns: Sequence[str] = ROLLED_COLUMNS,
    ) -> dict[str, list[Any]]:
        """Rolled-up rows with since <= at < until as plain columns of equal length: uuid, at (the slot's start, a
        multiple of 300) and `columns`, in the order of VMs and time. A slot without samples has no row."""
        query: Select[Any] = (
            select(OBSERVED_VM.c.uuid, ROLLED_SAMPLE.c.at, *(ROLLED_SAMPLE.c[n] for n in columns))
            .join(OBSERVED_VM, OBSERVED_VM.c.id == ROLLED_SAMPLE.c.vm)
            .where(ROLLED_SAMPLE.c.at >= since, ROLLED_SAMPLE.c.at < until)
            .order_by(ROLLED_SAMPLE.c.vm, ROLLED_SAMPLE.c.at)
        )
        if host is not None:
            query = query.where(OBSERVED_VM.c.host == host)
        if uuids is not None:
            query = query.where(OBSERVED_VM.c.uuid.in_(list(uuids)))
        with self._database.transaction(write=False) as connection:
            rows = connection.execute(query).all()
        names = ("uuid", "at", *columns)
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}

    def put_series(self, host: str, names: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> int:
        """Take rolled-up rows from elsewhere, in the form that `series` gives; columns that are not there are unknown.
        names are the VMs' by uuid. A row that is there already stays; how many rows were offered."""
        count = len(columns["at"])
        with self._database.transaction(write=True) as connection:
            ids = self._known(connection, host, {u: as_text(names.get(u, u)) for u in dict.fromkeys(columns["uuid"])})
            given = [columns.get(name) or [None] * count for name in ROLLED_COLUMNS]
            vms = [ids[uuid][0] for uuid in columns["uuid"]]
            slots = [int(at) // SLOT * SLOT for at in columns["at"]]
            insert_rows(connection, ROLLED_SAMPLE, list(zip(slots, vms, *given, strict=True)))
        return count

    def events(self, host: str, since: float, uuid: str | None = None) -> list[dict[str, Any]]:
        """What happened after `since`, in the order of time; rows of the table."""
        query = select(VM_EVENT).where(VM_EVENT.c.host == host, VM_EVENT.c.at > since).order_by(VM_EVENT.c.at)
        if uuid is not None:
            query = query.where(VM_EVENT.c.vm_uuid == uuid)
        with self._database.transaction(write=False) as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def observed(self, host: str) -> dict[str, dict[str, Any]]:
        """The VMs that were ever observed, by uuid: name and job_type."""
        query = select(OBSERVED_VM).where(OBSERVED_VM.c.host == host)
        with self._database.transaction(write=False) as connection:
            return {row.uuid: {"name": row.name, "job_type": row.job_type} for row in connection.execute(query)}


def _of(host: str) -> Select[tuple[int]]:
    return select(OBSERVED_VM.c.id).where(OBSERVED_VM.c.host == host)


def _event_row(host: str, event: VmEvent) -> dict[str, Any]:
    return {
        "host": host,
        "vm_uuid": event.vm_uuid,
        "vm_name": event.vm_name,
        "kind": event.kind.value,
        "at": event.at,
        "detail": event.detail,
        "operation": event.operation,
    }
