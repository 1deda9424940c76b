"""Hosts, what their VMs were promised, and the journal of operations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "host",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "vm",
        sa.Column("host", sa.Text(), sa.ForeignKey("host.name"), primary_key=True),
        sa.Column("uuid", sa.Text(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("record", sa.JSON()),
        sa.Column("cpu", sa.BigInteger(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("network", sa.BigInteger(), nullable=False),
        sa.Column("iops", sa.BigInteger(), nullable=False),
        sa.Column("holds", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "operation",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), sa.ForeignKey("host.name"), nullable=False),
        sa.Column("vm_uuid", sa.Text(), nullable=False),
        sa.Column("vm_name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("before", sa.JSON(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.Text(), nullable=False),
        sa.Column("closed_at", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("key", sa.Text()),
        sa.Column("result", sa.JSON()),
        sa.Column("held_cpu", sa.BigInteger()),
        sa.Column("held_memory", sa.BigInteger()),
        sa.Column("held_network", sa.BigInteger()),
        sa.Column("held_iops", sa.BigInteger()),
    )
    only_open = sa.text("state = 'open'")
    op.create_index(
        "operation_one_open_per_vm",
        "operation",
        ["host", "vm_uuid"],
        unique=True,
        sqlite_where=only_open,
        postgresql_where=only_open,
    )
    op.create_index("operation_key", "operation", ["host", "key"], unique=True)
    op.create_index("operation_of_vm", "operation", ["host", "vm_uuid", "id"])
    op.create_table(
        "operation_step",
        sa.Column("operation_id", IDENTITY, sa.ForeignKey("operation.id"), primary_key=True),
        sa.Column("seq", sa.Integer(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
    )
