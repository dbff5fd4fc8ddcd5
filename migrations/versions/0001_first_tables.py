"""The first tables: jobs, shards, requests, results, holds, attempts, workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _jobs()
    _shards()
    _requests()
    _results()
    _holds()
    _attempts()
    _workers()


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("no", sa.Integer(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("ending", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("endpoint", sa.Text(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.Column("input_name", sa.Text(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("started_at", sa.Float(53), nullable=True),
        sa.Column("finished_at", sa.Float(53), nullable=True),
        sa.Column("deadline_at", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("no"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "priority"], unique=False)


def _shards() -> None:
    op.create_table(
        "shards",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("job_no", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("claimed_by", sa.Text(), nullable=True),
        sa.Column("claim_token", sa.Text(), nullable=True),
        sa.Column("queued_at", sa.Float(53), nullable=True),
        sa.Column("finished_at", sa.Float(53), nullable=True),
        sa.Column("num_requests", sa.Integer(), nullable=False),
        sa.Column("num_succeeded", sa.Integer(), nullable=False),
        sa.Column("num_rejected", sa.Integer(), nullable=False),
        sa.Column("num_failed", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("queued_s", sa.Float(53), nullable=False),
        sa.Column("prefill_s", sa.Float(53), nullable=False),
        sa.Column("handoff_s", sa.Float(53), nullable=False),
        sa.Column("transfer_s", sa.Float(53), nullable=False),
        sa.Column("decode_s", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["job_no"], ["jobs.no"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "shards_by_claimer",
        "shards",
        ["claimed_by"],
        unique=False,
        sqlite_where=sa.text("claimed_by IS NOT NULL"),
        postgresql_where=sa.text("claimed_by IS NOT NULL"),
    )
    op.create_index("shards_by_job", "shards", ["job_no", "state", "model", "id"], unique=False)


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("shard_id", BIG, nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("num_retries", sa.Integer(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("requests_by_shard", "requests", ["shard_id"], unique=False)


def _results() -> None:
    op.create_table(
        "results",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("output_tokens", sa.Integer(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.Float(53), nullable=False),
        sa.Column("written_by", sa.Text(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "results_in_error",
        "results",
        ["id"],
        unique=False,
        sqlite_where=sa.text("status <> 'succeeded'"),
        postgresql_where=sa.text("status <> 'succeeded'"),
    )


def _holds() -> None:
    op.create_table(
        "holds",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("taken_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("holds_by_worker", "holds", ["worker_id"], unique=False)


def _attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("shard_id", BIG, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(53), nullable=False),
        sa.Column("ended_at", sa.Float(53), nullable=True),
        sa.ForeignKeyConstraint(["shard_id"], ["shards.id"]),
        sa.PrimaryKeyConstraint("shard_id", "attempt"),
    )


def _workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.Column("stats", sa.JSON(), nullable=False),
        sa.Column("registered_at", sa.Float(53), nullable=False),
        sa.Column("heartbeat_at", sa.Float(53), nullable=False),
        sa.Column("ended_at", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "workers_one_life",
        "workers",
        ["name", "host"],
        unique=True,
        sqlite_where=sa.text("state = 'live'"),
        postgresql_where=sa.text("state = 'live'"),
    )
