"""Shards count the engines' time and the KV that was handed over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _add(sa.Column("engine_s", sa.Float(53), nullable=False, server_default="0"))
    _add(sa.Column("transfer_bytes", sa.BigInteger(), nullable=False, server_default="0"))


def _add(column: sa.Column[int] | sa.Column[float]) -> None:
    """The default is for the rows that are there; who writes a shard names every column."""
    op.add_column("shards", column)
