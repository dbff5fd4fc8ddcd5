"""The tables.

    jobs ─1:n─ shards ─1:n─ requests ─1:1─ results     one terminal row for each request
                 └─1:n─ attempts          └─1:1─ holds  a decode worker answers for it
    workers                                            one row for each life of a worker

Keys of requests, results and holds are one 64-bit number: the job's number in the upper 31 bits,
the request's index in the lower 32 (see `pdbatch.store.keys`); shards have theirs alike. So
a job is one range of each table, in the order of its input, and no wide index is needed.
No foreign keys on the hot tables: rows are never deleted one by one.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION = "0003"
"""The revision that this code needs; a test holds it to the newest migration."""

_Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite: INTEGER PRIMARY KEY is the row id


class Base(DeclarativeBase):
    """Of all tables here."""


class Job(Base):
    __tablename__ = "jobs"

    no: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    state: Mapped[str] = mapped_column(Text)
    ending: Mapped[str | None] = mapped_column(Text)
    """The terminal state that the job is being brought to by cancel, fail or expiry."""
    model: Mapped[str | None] = mapped_column(Text)
    endpoint: Mapped[str | None] = mapped_column(Text)
    priority: Mapped[int] = mapped_column(Integer)
    weight: Mapped[int] = mapped_column(Integer)
    input_name: Mapped[str] = mapped_column(Text)
    meta: Mapped[dict[str, str]] = mapped_column("metadata", JSON)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Float(53))
    started_at: Mapped[float | None] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))
    deadline_at: Mapped[float | None] = mapped_column(Float(53))
    heard_at: Mapped[float | None] = mapped_column(Float(53))
    """Last sign of life of who takes its lines in."""

    __table_args__ = (Index("jobs_by_state", "state", "priority"),)


class Shard(Base):
    __tablename__ = "shards"

    id: Mapped[int] = mapped_column(_Big, primary_key=True, autoincrement=False)
    job_no: Mapped[int] = mapped_column(ForeignKey("jobs.no"))
    model: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int] = mapped_column(Integer)
    """Of the message that may claim it, or that did; 1 at first."""
    claimed_by: Mapped[str | None] = mapped_column(Text)
    claim_token: Mapped[str | None] = mapped_column(Text)
    """Drawn by each call of claim: one whose commit went unheard knows its own claim again."""
    queued_at: Mapped[float | None] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))
    num_requests: Mapped[int] = mapped_column(Integer)
    num_succeeded: Mapped[int] = mapped_column(Integer)
    num_rejected: Mapped[int] = mapped_column(Integer)
    num_failed: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    queued_s: Mapped[float] = mapped_column(Float(53))
    prefill_s: Mapped[float] = mapped_column(Float(53))
    handoff_s: Mapped[float] = mapped_column(Float(53))
    transfer_s: Mapped[float] = mapped_column(Float(53))
    decode_s: Mapped[float] = mapped_column(Float(53))
    engine_s: Mapped[float] = mapped_column(Float(53))
    transfer_bytes: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        Index("shards_by_job", "job_no", "state", "model", "id"),
        Index(
            "shards_by_claimer",
            "claimed_by",
            sqlite_where=text("claimed_by IS NOT NULL"),
            postgresql_where=text("claimed_by IS NOT NULL"),
        ),
    )


class Request(Base):
    __tablename__ = "requests"

    id: Mapped[int] = mapped_column(_Big, primary_key=True, autoincrement=False)
    shard_id: Mapped[int] = mapped_column(_Big)
    line: Mapped[int] = mapped_column(Integer)
    num_retries: Mapped[int] = mapped_column(Integer)
    endpoint: Mapped[str] = mapped_column(Text)
    custom_id: Mapped[str | None] = mapped_column(Text)
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    """JSON of a RequestSpec; NULL for a line that was rejected."""

    __table_args__ = (Index("requests_by_shard", "shard_id"),)


class Result(Base):
    __tablename__ = "results"

    id: Mapped[int] = mapped_column(_Big, primary_key=True, autoincrement=False)
    status: Mapped[str] = mapped_column(Text)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    cached_tokens: Mapped[int] = mapped_column(Integer)
    output_tokens: Mapped[int] = mapped_column(Integer)
    finish_reason: Mapped[str | None] = mapped_column(Text)
    finished_at: Mapped[float] = mapped_column(Float(53))
    written_by: Mapped[str | None] = mapped_column(Text)
    """The worker, or NULL: ingest, cancel, expiry, a reconciler."""
    body: Mapped[bytes] = mapped_column(LargeBinary)
    """JSON of a RequestOutput."""

    __table_args__ = (
        Index(
            "results_in_error",
            "id",
            sqlite_where=text("status <> 'succeeded'"),
            postgresql_where=text("status <> 'succeeded'"),
        ),
    )


class Hold(Base):
    __tablename__ = "holds"

    id: Mapped[int] = mapped_column(_Big, primary_key=True, autoincrement=False)
    worker_id: Mapped[str] = mapped_column(Text)
    taken_at: Mapped[float] = mapped_column(Float(53))

    __table_args__ = (Index("holds_by_worker", "worker_id"),)


class Attempt(Base):
    __tablename__ = "attempts"

    shard_id: Mapped[int] = mapped_column(
        _Big, ForeignKey("shards.id"), primary_key=True, autoincrement=False
    )
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    worker_id: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    started_at: Mapped[float] = mapped_column(Float(53))
    ended_at: Mapped[float | None] = mapped_column(Float(53))


class Worker(Base):
    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    epoch: Mapped[int] = mapped_column(BigInteger)
    role: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    device: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text)
    """`live`, `retired` or `dead`."""
    info: Mapped[dict[str, Any]] = mapped_column(JSON)
    stats: Mapped[dict[str, Any]] = mapped_column(JSON)
    registered_at: Mapped[float] = mapped_column(Float(53))
    heartbeat_at: Mapped[float] = mapped_column(Float(53))
    ended_at: Mapped[float | None] = mapped_column(Float(53))

    __table_args__ = (
        Index(
            "workers_one_life",
            "name",
            "host",
            unique=True,
            sqlite_where=text("state = 'live'"),
            postgresql_where=text("state = 'live'"),
        ),
    )


JOBS = cast(Table, Job.__table__)
SHARDS = cast(Table, Shard.__table__)
REQUESTS = cast(Table, Request.__table__)
RESULTS = cast(Table, Result.__table__)
HOLDS = cast(Table, Hold.__table__)
ATTEMPTS = cast(Table, Attempt.__table__)
WORKERS = cast(Table, Worker.__table__)
