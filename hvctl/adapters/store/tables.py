"""The tables of the journal and of what is promised. hvctl/migrations makes them, with their indexes (naming those here
would load both databases' dialects into every command); a test compares the columns."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Dialect, ForeignKey, Integer, Text, TypeDecorator
from sqlmodel import Field, SQLModel

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def as_text(value: str) -> str:
    """What a database makes of a text."""
    return _NOT_TEXT.sub("\ufffd", value)


class Words(TypeDecorator[str]):
    """Text that both databases take. Reasons and details may quote a guest or a command line: what is not Unicode,
    and the NUL that PostgreSQL has no place for, become U+FFFD instead of an operation that cannot be closed."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else as_text(value)


Document = JSON(none_as_null=True)
Identity = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows only in a column typed INTEGER


class HostRow(SQLModel, table=True):
    __tablename__ = "host"

    name: str = Field(primary_key=True, sa_type=Words)
    generation: int = Field(sa_type=BigInteger)


class VmRow(SQLModel, table=True):
    """What a VM was promised, after its last closed operation."""

    __tablename__ = "vm"

    host: str = Field(primary_key=True, foreign_key="host.name", sa_type=Words)
    uuid: str = Field(primary_key=True, sa_type=Words)
    name: str = Field(sa_type=Words)
    record: dict[str, Any] | None = Field(sa_column=Column(Document))
    cpu: int = Field(sa_type=BigInteger)
    memory: int = Field(sa_type=BigInteger)
    network: int = Field(sa_type=BigInteger)
    iops: int = Field(sa_type=BigInteger)
    holds: bool


class OperationRow(SQLModel, table=True):
    """model.Operation, and what it holds of its host until it is closed (all NULL: nothing)."""

    __tablename__ = "operation"
    id: int = Field(sa_column=Column(Identity, primary_key=True))
    host: str = Field(foreign_key="host.name", sa_type=Words)
    vm_uuid: str = Field(sa_type=Words)
    vm_name: str = Field(sa_type=Words)
    kind: str = Field(sa_type=Words)
    state: str = Field(sa_type=Words)
    request: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))
    before: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))
    who: str = Field(sa_type=Words)
    boot_id: str = Field(sa_type=Words)
    opened_at: str = Field(sa_type=Words)
    closed_at: str | None = Field(sa_type=Words)
    reason: str | None = Field(sa_type=Words)
    key: str | None = Field(sa_type=Words)
    result: dict[str, Any] | None = Field(sa_column=Column(Document))
    held_cpu: int | None = Field(sa_type=BigInteger)
    held_memory: int | None = Field(sa_type=BigInteger)
    held_network: int | None = Field(sa_type=BigInteger)
    held_iops: int | None = Field(sa_type=BigInteger)


class StepRow(SQLModel, table=True):
    __tablename__ = "operation_step"

    operation_id: int = Field(sa_column=Column(Identity, ForeignKey("operation.id"), primary_key=True))
    seq: int = Field(primary_key=True)
    name: str = Field(sa_type=Words)
    detail: str = Field(sa_type=Words)
    seconds: float
    outcome: str = Field(sa_type=Words)
    facts: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))


HOST = SQLModel.metadata.tables["host"]
VM = SQLModel.metadata.tables["vm"]
OPERATION = SQLModel.metadata.tables["operation"]
STEP = SQLModel.metadata.tables["operation_step"]
