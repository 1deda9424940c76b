"""What VMs used, raw and rolled up, what happened to them, and the runs and pauses of the daemon's jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# As they are at this revision: a later one that measures more adds columns.
STORED = (
    "seconds", "uptime", "vcpus", "cpu", "cpu_busiest", "steal", "memory", "memory_used", "memory_unused",
    "memory_available", "memory_usable", "rss", "disk_reads", "disk_writes", "disk_read_bytes", "disk_write_bytes",
    "net_rx_bytes", "net_tx_bytes", "net_rx_packets", "net_tx_packets", "connections", "stall_cpu", "stall_memory",
    "stall_io", "cycles", "instructions", "cache_misses",
)  # fmt: skip
KEPT = ("count", "seconds", "vcpus", "memory")
ROLLED = (
    "cpu", "steal", "memory_used", "rss", "disk_reads", "disk_writes", "disk_read_bytes", "disk_write_bytes",
    "net_rx_bytes", "net_tx_bytes", "net_rx_packets", "net_tx_packets", "connections", "stall_cpu", "stall_memory",
    "stall_io", "cycles", "instructions", "cache_misses",
)  # fmt: skip


def upgrade() -> None:
    op.create_table(
        "observed_vm",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("uuid", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("job_type", sa.Text()),
    )
    op.create_index("observed_vm_uuid", "observed_vm", ["host", "uuid"], unique=True)
    for table, names in (
        ("raw_sample", STORED),
        ("rolled_sample", KEPT + tuple(f"{m}_{s}" for m in ROLLED for s in ("mean", "max", "p95"))),
    ):
        # In the order of time, so that a cycle appends and what is old goes in whole pages.
        op.create_table(
            table,
            sa.Column("at", sa.BigInteger(), primary_key=True),
            sa.Column("vm", sa.BigInteger(), primary_key=True),
            *(sa.Column(n, sa.Double() if n.startswith(("memory", "rss")) else sa.REAL()) for n in names),
            sqlite_with_rowid=False,
        )
    op.create_index("rolled_sample_vm", "rolled_sample", ["vm", "at"])
    op.create_table(
        "vm_event",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("vm_uuid", sa.Text(), nullable=False),
        sa.Column("vm_name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("operation", sa.BigInteger()),
    )
    op.create_index("vm_event_vm", "vm_event", ["host", "vm_uuid", "at"])
    op.create_index("vm_event_operation", "vm_event", ["host", "operation"], unique=True)
    op.create_table(
        "collector",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("rolled_until", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "job_run",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
    )
    op.create_index("job_run_job", "job_run", ["host", "job", "id"])
    op.create_table(
        "job_pause",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("job", sa.Text(), primary_key=True),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
    )
    op.create_index("operation_closed", "operation", ["host", "closed_at"])
