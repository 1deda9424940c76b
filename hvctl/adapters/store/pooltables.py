"""The tables of a host's pool: reservations, VMs that are away, and limits that were set. hvctl/migrations makes
them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Float, ForeignKey
from sqlmodel import Field, SQLModel

from hvctl.adapters.store.tables import Document, Identity, Words


class ReservationRow(SQLModel, table=True):
    """model.Reservation; a vector of resources is four columns."""

    __tablename__ = "reservation"
    id: int = Field(sa_column=Column(Identity, primary_key=True))
    host: str = Field(foreign_key="host.name", sa_type=Words)
    owner: str = Field(sa_type=Words)
    reason: str = Field(sa_type=Words)
    state: str = Field(sa_type=Words)
    size_cpu: int = Field(sa_type=BigInteger)
    size_memory: int = Field(sa_type=BigInteger)
    size_network: int = Field(sa_type=BigInteger)
    size_iops: int = Field(sa_type=BigInteger)
    granted_cpu: int = Field(sa_type=BigInteger)
    granted_memory: int = Field(sa_type=BigInteger)
    granted_network: int = Field(sa_type=BigInteger)
    granted_iops: int = Field(sa_type=BigInteger)
    used_cpu: int = Field(sa_type=BigInteger)
    used_memory: int = Field(sa_type=BigInteger)
    used_network: int = Field(sa_type=BigInteger)
    used_iops: int = Field(sa_type=BigInteger)
    starts_at: float = Field(sa_type=Float)
    ends_at: float | None = Field(sa_type=Float)
    half_life: float | None = Field(sa_type=Float)
    idle_since: float = Field(sa_type=Float)
    accounted_at: float = Field(sa_type=Float)
    made_at: float = Field(sa_type=Float)
    closed_at: float | None = Field(sa_type=Float)
    who: str = Field(sa_type=Words)
    key: str | None = Field(sa_type=Words)
    reserved_seconds: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))
    used_seconds: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))
    errand: dict[str, Any] | None = Field(sa_column=Column(Document))
    demand: int | None = Field(sa_column=Column(Identity, ForeignKey("reservation.id")))


class AwayRow(SQLModel, table=True):
    """model.Away in `document`, beside what is looked for."""

    __tablename__ = "away"
    id: int = Field(sa_column=Column(Identity, primary_key=True))
    host: str = Field(foreign_key="host.name", sa_type=Words)
    vm_uuid: str = Field(sa_type=Words)
    demand: int | None = Field(sa_column=Column(Identity, ForeignKey("reservation.id")))
    out_at: float = Field(sa_type=Float)
    return_at: float = Field(sa_type=Float)
    returned_at: float | None = Field(sa_type=Float)
    document: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))


class PoolRow(SQLModel, table=True):
    __tablename__ = "pool"

    host: str = Field(primary_key=True, foreign_key="host.name", sa_type=Words)
    limits: dict[str, Any] = Field(sa_column=Column(Document, nullable=False))


RESERVATION = SQLModel.metadata.tables["reservation"]
AWAY = SQLModel.metadata.tables["away"]
POOL = SQLModel.metadata.tables["pool"]
