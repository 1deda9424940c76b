"""What VMs needed right after their starts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "restart",
        sa.Column("host", sa.Text(), primary_key=True),
        sa.Column("vm_uuid", sa.Text(), primary_key=True),
        sa.Column("at", sa.Float(), primary_key=True),
        sa.Column("span", sa.Integer(), primary_key=True),
        sa.Column("image", sa.Text()),
        sa.Column("gap", sa.Float()),
        sa.Column("peak", sa.JSON(), nullable=False),
        sa.Column("mean", sa.JSON(), nullable=False),
        sa.Column("before", sa.JSON(), nullable=False),
    )
