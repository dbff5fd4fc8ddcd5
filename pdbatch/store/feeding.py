"""From PENDING to QUEUED and back: what the feeder asks of the store, each in one transaction.

Fairness is counted, not remembered: a place in a queue goes to the job with the fewest shards in
flight (queued or claimed) for its weight. So it is right after any restart, with any number
of feeders, and a job of one shard behind a job of ten thousand waits for one refill.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update
from sqlalchemy import exists as sql_exists

from pdbatch.states import JobState, ShardState
from pdbatch.store.database import Database
from pdbatch.store.idsets import is_in
from pdbatch.store.keys import job_no_of, shard_index_of
from pdbatch.store.models import JOBS, SHARDS
from pdbatch.store.rows import QueueDepth, ShardMessage

_OPEN_JOB = (JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.ending.is_(None))
_IN_FLIGHT = (str(ShardState.QUEUED), str(ShardState.CLAIMED))


def pending_queues(conn: Connection) -> list[QueueDepth]:
    """See `Shards.pending_queues`."""
    return _depths(conn, ShardState.PENDING, None)


def queued_queues(conn: Connection, queued_before: float) -> list[QueueDepth]:
    """See `Shards.queued_queues`."""
    return _depths(conn, ShardState.QUEUED, queued_before)


def _depths(conn: Connection, state: ShardState, before: float | None) -> list[QueueDepth]:
    query = (
        select(SHARDS.c.model, JOBS.c.priority, func.count().label("num_shards"))
        .join_from(JOBS, SHARDS, SHARDS.c.job_no == JOBS.c.no)
        .where(*_OPEN_JOB, SHARDS.c.state == state)
        .group_by(SHARDS.c.model, JOBS.c.priority)
        .order_by(JOBS.c.priority, SHARDS.c.model)
    )
    if before is not None:
        query = query.where(SHARDS.c.queued_at < before)
    return [QueueDepth(*row) for row in conn.execute(query)]


@dataclass(slots=True)
class _Candidate:
    """A job with PENDING shards of the queue's model."""

    no: int
    weight: int
    in_flight: int
    pending: deque[tuple[int, int]] | None = None
    """(shard id, attempt), locked; fetched when the job's first turn comes."""


def take(
    db: Database, conn: Connection, model: str, priority: int, limit: int, now: float | None
) -> list[ShardMessage]:
    """See `Shards.take_for_publish`."""
    chosen = _choose(conn, _candidates(conn, model, priority), model, limit)
    if not chosen:
        return []
    ids = [id_ for id_, _ in chosen]
    queued_at = db.dialect.now(conn) if now is None else now
    values = {"state": str(ShardState.QUEUED), "queued_at": queued_at}
    conn.execute(update(SHARDS).where(is_in(SHARDS.c.id, ids)).values(values))
    jobs = db.job_ids(conn, {job_no_of(id_) for id_ in ids})
    return [
        ShardMessage(jobs[job_no_of(id_)], shard_index_of(id_), attempt) for id_, attempt in chosen
    ]


def _candidates(conn: Connection, model: str, priority: int) -> list[_Candidate]:
    mine = (SHARDS.c.job_no == JOBS.c.no, SHARDS.c.model == model)
    in_flight = select(func.count()).where(*mine, SHARDS.c.state.in_(_IN_FLIGHT)).scalar_subquery()
    query = select(JOBS.c.no, JOBS.c.weight, in_flight).where(
        *_OPEN_JOB,
        JOBS.c.priority == priority,
        sql_exists().where(*mine, SHARDS.c.state == ShardState.PENDING),
    )
    return [_Candidate(*row) for row in conn.execute(query)]


def _choose(
    conn: Connection, candidates: list[_Candidate], model: str, limit: int
) -> list[tuple[int, int]]:
    """(shard id, attempt) of those to publish, in this order."""
    turns = [((job.in_flight + 1) / job.weight, job.no, job) for job in candidates]
    heapq.heapify(turns)
    chosen: list[tuple[int, int]] = []
    while turns and len(chosen) < limit:
        _, no, job = heapq.heappop(turns)
        if job.pending is None:
            job.pending = _lock_pending(conn, no, model, limit - len(chosen))
        if not job.pending:
            continue
        chosen.append(job.pending.popleft())
        job.in_flight += 1
        heapq.heappush(turns, ((job.in_flight + 1) / job.weight, no, job))
    return chosen


def _lock_pending(conn: Connection, job_no: int, model: str, limit: int) -> deque[tuple[int, int]]:
    query = (
        select(SHARDS.c.id, SHARDS.c.attempt)
        .where(
            SHARDS.c.job_no == job_no,
            SHARDS.c.model == model,
            SHARDS.c.state == ShardState.PENDING,
        )
        .order_by(SHARDS.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    )
    return deque((row.id, row.attempt) for row in conn.execute(query))


def requeue(db: Database, conn: Connection, queued_before: float, model: str, priority: int) -> int:
    """See `Shards.requeue`."""
    query = (
        select(SHARDS.c.id)
        .join_from(JOBS, SHARDS, SHARDS.c.job_no == JOBS.c.no)
        .where(
            *_OPEN_JOB,
            JOBS.c.priority == priority,
            SHARDS.c.model == model,
            SHARDS.c.state == ShardState.QUEUED,
            SHARDS.c.queued_at < queued_before,
        )
        .with_for_update(skip_locked=True, key_share=True, of=SHARDS)
    )
    ids = conn.execute(query).scalars().all()
    if ids:
        values = {"state": str(ShardState.PENDING), "queued_at": None}
        conn.execute(update(SHARDS).where(is_in(SHARDS.c.id, ids)).values(values))
    return len(ids)
