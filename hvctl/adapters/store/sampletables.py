"""The tables of what VMs used, what happened to them, and of the daemon's jobs. Like those of tables.py they are made
by hvctl/migrations, which also says that samples lie in the order of their time."""

from __future__ import annotations

from sqlalchemy import REAL, BigInteger, Column, Double, Float, Integer, Table
from sqlmodel import SQLModel

from hvctl.adapters.store.tables import Document, Identity, Words
from hvctl.model.sample import ROLLED_COLUMNS, STORED


def _measured(name: str) -> Column[float]:
    """Seven digits are enough for a rate, which PostgreSQL keeps in four bytes; sizes are exact. SQLite keeps both in
    as few bytes as they need."""
    return Column(name, Double if name.startswith(("memory", "rss")) else REAL)


OBSERVED_VM = Table(
    "observed_vm",
    SQLModel.metadata,
    Column("id", Identity, primary_key=True),
    Column("host", Words, nullable=False),
    Column("uuid", Words, nullable=False),
    Column("name", Words, nullable=False),
    Column("job_type", Words),
)
# at is whole seconds since 1970.
RAW_SAMPLE = Table(
    "raw_sample",
    SQLModel.metadata,
    Column("at", BigInteger, primary_key=True),
    Column("vm", BigInteger, primary_key=True),
    *(_measured(name) for name in STORED),
)
ROLLED_SAMPLE = Table(
    "rolled_sample",
    SQLModel.metadata,
    Column("at", BigInteger, primary_key=True),
    Column("vm", BigInteger, primary_key=True),
    *(_measured(name) for name in ROLLED_COLUMNS),
)
VM_EVENT = Table(
    "vm_event",
    SQLModel.metadata,
    Column("id", Identity, primary_key=True),
    Column("host", Words, nullable=False),
    Column("vm_uuid", Words, nullable=False),
    Column("vm_name", Words, nullable=False),
    Column("kind", Words, nullable=False),
    Column("at", Float, nullable=False),
    Column("detail", Words, nullable=False),
    Column("operation", BigInteger),
)
COLLECTOR = Table(
    "collector",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("rolled_until", BigInteger, nullable=False),
)
RESTART = Table(
    "restart",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("vm_uuid", Words, primary_key=True),
    Column("at", Float, primary_key=True),
    Column("span", Integer, primary_key=True),
    Column("image", Words),
    Column("gap", Float),
    Column("peak", Document, nullable=False),
    Column("mean", Document, nullable=False),
    Column("before", Document, nullable=False),
)
JOB_RUN = Table(
    "job_run",
    SQLModel.metadata,
    Column("id", Identity, primary_key=True),
    Column("host", Words, nullable=False),
    Column("job", Words, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("state", Words, nullable=False),
    Column("detail", Words, nullable=False),
    Column("who", Words, nullable=False),
)
JOB_PAUSE = Table(
    "job_pause",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("job", Words, primary_key=True),
    Column("since", Float, nullable=False),
    Column("who", Words, nullable=False),
)
