"""Margins that are kept between runs, and means that are compared as peaks are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    for name in ("model_mean", "rule_mean", "actual_mean"):
        op.add_column("forecast", sa.Column(name, sa.Float()))
    _standings_by_target()
    whose = ("host", "model_name", "answered", "resource", "target")
    op.create_table(
        "fleet_margin",
        *(sa.Column(name, sa.Text(), primary_key=True) for name in whose),
        sa.Column("level", sa.Float(), nullable=False),
        sa.Column("cases", sa.BigInteger(), nullable=False),
        sa.Column("recent", sa.Float(), nullable=False),
        sa.Column("covered", sa.Float(), nullable=False),
        sa.Column("learned_at", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "vm_margin",
        *(sa.Column(name, sa.Text(), primary_key=True) for name in whose),
        sa.Column("vm_uuid", sa.Text(), primary_key=True),
        sa.Column("level", sa.Float(), nullable=False),
        sa.Column("seen", sa.BigInteger(), nullable=False),
        sa.Column("learned_at", sa.BigInteger(), nullable=False),
        sqlite_with_rowid=False,
    )


def _standings_by_target() -> None:
    """A key cannot be changed in SQLite, and the rows are few."""
    columns = ("host", "resource", "model_name", "model_loss", "rule_loss", "cases", "vms", "model", "learned_at")
    old = sa.table("standing", *(sa.column(n) for n in columns))
    rows = [dict(row._mapping) for row in op.get_bind().execute(sa.select(old))]
    op.drop_table("standing")
    new = op.create_table(
        "standing",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("target", sa.Text(), primary_key=True),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_loss", sa.Float(), nullable=False),
        sa.Column("rule_loss", sa.Float(), nullable=False),
        sa.Column("cases", sa.BigInteger(), nullable=False),
        sa.Column("vms", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Boolean(), nullable=False),
        sa.Column("learned_at", sa.BigInteger(), nullable=False),
    )
    # What was compared until now were peaks.
    op.bulk_insert(new, [row | {"target": "peak", "model": bool(row["model"])} for row in rows])
