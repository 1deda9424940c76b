"""Reservations, VMs that are away, and what was set for a host's pool."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    counted = ("cpu", "memory", "network", "iops")
    op.create_table(
        "reservation",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), sa.ForeignKey("host.name"), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        *(sa.Column(f"size_{n}", sa.BigInteger(), nullable=False) for n in counted),
        *(sa.Column(f"granted_{n}", sa.BigInteger(), nullable=False) for n in counted),
        *(sa.Column(f"used_{n}", sa.BigInteger(), nullable=False) for n in counted),
        sa.Column("starts_at", sa.Float(), nullable=False),
        sa.Column("ends_at", sa.Float()),
        sa.Column("half_life", sa.Float()),
        sa.Column("idle_since", sa.Float(), nullable=False),
        sa.Column("accounted_at", sa.Float(), nullable=False),
        sa.Column("made_at", sa.Float(), nullable=False),
        sa.Column("closed_at", sa.Float()),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("reserved_seconds", sa.JSON(), nullable=False),
        sa.Column("used_seconds", sa.JSON(), nullable=False),
        sa.Column("errand", sa.JSON()),
        sa.Column("demand", IDENTITY, sa.ForeignKey("reservation.id")),
    )
    op.create_index("reservation_of_host", "reservation", ["host", "state"])
    op.create_index("reservation_key", "reservation", ["host", "key"], unique=True)
    op.create_table(
        "away",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), sa.ForeignKey("host.name"), nullable=False),
        sa.Column("vm_uuid", sa.Text(), nullable=False),
        sa.Column("demand", IDENTITY, sa.ForeignKey("reservation.id")),
        sa.Column("out_at", sa.Float(), nullable=False),
        sa.Column("return_at", sa.Float(), nullable=False),
        sa.Column("returned_at", sa.Float()),
        sa.Column("document", sa.JSON(), nullable=False),
    )
    is_away = sa.text("returned_at IS NULL")
    op.create_index(
        "away_once", "away", ["host", "vm_uuid"], unique=True, sqlite_where=is_away, postgresql_where=is_away
    )
    op.create_table(
        "pool",
        sa.Column("host", sa.Text(), sa.ForeignKey("host.name"), primary_key=True),
        sa.Column("limits", sa.JSON(), nullable=False),
    )
