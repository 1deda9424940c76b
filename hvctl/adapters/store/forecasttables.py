"""The tables of forecasts that are kept, of what they were worth, and of their margins; hvctl/migrations makes them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Table
from sqlmodel import SQLModel

from hvctl.adapters.store.tables import Words

# In the order of model.prediction.Prediction, the host before it.
FORECAST = Table(
    "forecast",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("made_at", BigInteger, primary_key=True),
    Column("vm_uuid", Words, primary_key=True),
    Column("resource", Words, primary_key=True),
    Column("horizon", BigInteger, nullable=False),
    Column("quantile", Float, nullable=False),
    Column("peak", Float, nullable=False),
    Column("mean", Float, nullable=False),
    Column("rule", Words, nullable=False),
    Column("answered", Words, nullable=False),
    Column("model", Words),
    Column("model_peak", Float),
    Column("rule_peak", Float, nullable=False),
    Column("scale", Float, nullable=False),
    Column("actual_peak", Float),
    Column("model_mean", Float),
    Column("rule_mean", Float),
    Column("actual_mean", Float),
)
STANDING = Table(
    "standing",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("resource", Words, primary_key=True),
    Column("target", Words, primary_key=True),
    Column("model_name", Words, nullable=False),
    Column("model_loss", Float, nullable=False),
    Column("rule_loss", Float, nullable=False),
    Column("cases", BigInteger, nullable=False),
    Column("vms", BigInteger, nullable=False),
    Column("model", Boolean, nullable=False),
    Column("learned_at", BigInteger, nullable=False),
)
# In the order of model.prediction.FleetMargin and VmMargin, the host before them.
FLEET_MARGIN = Table(
    "fleet_margin",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("model_name", Words, primary_key=True),
    Column("answered", Words, primary_key=True),
    Column("resource", Words, primary_key=True),
    Column("target", Words, primary_key=True),
    Column("level", Float, nullable=False),
    Column("cases", BigInteger, nullable=False),
    Column("recent", Float, nullable=False),
    Column("covered", Float, nullable=False),
    Column("learned_at", BigInteger, nullable=False),
)
VM_MARGIN = Table(
    "vm_margin",
    SQLModel.metadata,
    Column("host", Words, primary_key=True),
    Column("model_name", Words, primary_key=True),
    Column("answered", Words, primary_key=True),
    Column("resource", Words, primary_key=True),
    Column("target", Words, primary_key=True),
    Column("vm_uuid", Words, primary_key=True),
    Column("level", Float, nullable=False),
    Column("seen", BigInteger, nullable=False),
    Column("learned_at", BigInteger, nullable=False),
)
