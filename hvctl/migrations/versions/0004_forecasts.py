"""Forecasts that are kept until it is known what came, and what they were worth."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # By host and time, so that a round appends and what is old goes in whole pages.
    op.create_table(
        "forecast",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("made_at", sa.BigInteger(), primary_key=True),
        sa.Column("vm_uuid", sa.Text(), primary_key=True),
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("horizon", sa.BigInteger(), nullable=False),
        sa.Column("quantile", sa.Float(), nullable=False),
        sa.Column("peak", sa.Float(), nullable=False),
        sa.Column("mean", sa.Float(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("answered", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("model_peak", sa.Float()),
        sa.Column("rule_peak", sa.Float(), nullable=False),
        sa.Column("scale", sa.Float(), nullable=False),
        sa.Column("actual_peak", sa.Float()),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "standing",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("resource", sa.Text(), primary_key=True),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_loss", sa.Float(), nullable=False),
        sa.Column("rule_loss", sa.Float(), nullable=False),
        sa.Column("cases", sa.BigInteger(), nullable=False),
        sa.Column("vms", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Boolean(), nullable=False),
        sa.Column("learned_at", sa.BigInteger(), nullable=False),
    )
