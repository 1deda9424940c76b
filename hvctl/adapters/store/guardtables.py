"""The tables of guards: what each remembers, and what it decided; hvctl/migrations makes them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Table
from sqlmodel import SQLModel

from hvctl.adapters.store.tables import Document, Identity, Words

GUARD = Table(
    "guard",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("vm_uuid", Words, primary_key=True),
    Column("state", Document, nullable=False),
)
# model.guard.Decided in `document`, beside what is looked for; pending: what came of its action is not known yet.
DECISION = Table(
    "guard_decision",
    SQLModel.metadata,
    Column("id", Identity, primary_key=True),
    Column("host", Words, nullable=False),
    Column("vm_uuid", Words, nullable=False),
    Column("until", Float, nullable=False),
    Column("pending", Boolean, nullable=False),
    Column("kept_until", Float),
    Column("operation", BigInteger),
    Column("document", Document, nullable=False),
)
