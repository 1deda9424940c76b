"""What guards of VMs remember, and every decision of theirs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "guard",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("vm_uuid", sa.Text(), primary_key=True),
        sa.Column("state", sa.JSON(), nullable=False),
    )
    op.create_table(
        "guard_decision",
        sa.Column("id", IDENTITY, primary_key=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("vm_uuid", sa.Text(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("pending", sa.Boolean(), nullable=False),
        sa.Column("kept_until", sa.Float()),
        sa.Column("operation", sa.BigInteger()),
        sa.Column("document", sa.JSON(), nullable=False),
    )
    op.create_index("guard_decision_of_vm", "guard_decision", ["host", "vm_uuid", "id"])
    op.create_index("guard_decision_operation", "guard_decision", ["operation"])
