"""The moves that must agree: rows, counters of shards, holds, ends of shards and jobs.

All functions here run inside one transaction of the caller, which takes its locks as
`pdbatch.store.locks` has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, select, update

from pdbatch.ids import WorkerId, request_key
from pdbatch.request import RequestError, RequestOutput, StageTimes
from pdbatch.states import (
    TERMINAL_JOB_STATES,
    AttemptState,
    JobState,
    ResultStatus,
    ShardState,
    check_job_move,
    check_shard_move,
)
from pdbatch.store.database import Database
from pdbatch.store.dialects import ResultTuple
from pdbatch.store.idsets import is_in
from pdbatch.store.keys import job_no_of, request_index_of
from pdbatch.store.locks import ShardRow, lock_shards, without_row
from pdbatch.store.models import ATTEMPTS, HOLDS, JOBS, REQUESTS, SHARDS

_encode_json = msgspec.json.Encoder().encode
OPEN_STATES = tuple(str(state) for state in ShardState if state is not ShardState.DONE)
_STAGES = StageTimes.__struct_fields__
_COUNTERS = (
    "num_succeeded",
    "num_rejected",
    "num_failed",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "transfer_bytes",
    *_STAGES,
)
_COUNTER_OF = {
    ResultStatus.SUCCEEDED: "num_succeeded",
    ResultStatus.REJECTED: "num_rejected",
    ResultStatus.FAILED: "num_failed",
}


class Terminal(msgspec.Struct):
    """A terminal row on its way into the table."""

    id: int
    shard_id: int
    status: ResultStatus
    body: bytes
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    times: StageTimes | None = None
    transfer_bytes: int = 0


# --- rows


def write_rows(
    db: Database, conn: Connection, rows: Sequence[Terminal], worker: WorkerId | None = None
) -> int:
    """Writes those rows whose request has none, and all that follows from them: holds end,
    counters rise, complete shards are DONE, complete jobs end. Returns how many were new."""
    by_id = {row.id: row for row in reversed(rows)}  # of two in one call the first counts
    ordered = [by_id[id_] for id_ in sorted(by_id)]
    if not ordered:
        return 0
    shards = lock_shards(conn, {row.shard_id for row in ordered})
    now = db.dialect.now(conn)
    new = db.dialect.insert_results(conn, [result_tuple(row, now, worker) for row in ordered])
    fresh = [row for row in ordered if row.id in new]
    if not fresh:
        return 0
    conn.execute(_END_HOLDS, {"ids": new})
    added = _sums(fresh)
    done = [
        id_
        for id_, sums in added.items()
        if shards[id_].num_done + _rows_in(sums) == shards[id_].num_requests
    ]
    conn.execute(_ADD_COUNTERS, [{"key": id_, **sums} for id_, sums in added.items()])
    if done:
        _finish_shards(db, conn, [shards[id_] for id_ in done], now)
        finish_jobs(db, conn, {job_no_of(id_) for id_ in done})
    return len(fresh)


_END_HOLDS = delete(HOLDS).where(is_in(HOLDS.c.id, "ids"))
_ADD_COUNTERS = (
    update(SHARDS)
    .where(SHARDS.c.id == bindparam("key"))
    .values({name: SHARDS.c[name] + bindparam(f"add_{name}") for name in _COUNTERS})
)


def result_tuple(row: Terminal, now: float, worker: WorkerId | None) -> ResultTuple:
    """A terminal row as the table has it."""
    return (
        row.id,
        str(row.status),
        row.prompt_tokens,
        row.cached_tokens,
        row.output_tokens,
        row.finish_reason,
        now,
        worker,
        row.body,
    )


def _sums(rows: Iterable[Terminal]) -> dict[int, dict[str, float]]:
    sums: dict[int, dict[str, float]] = {}
    for row in rows:
        of_shard = sums.get(row.shard_id)
        if of_shard is None:
            of_shard = sums[row.shard_id] = dict.fromkeys((f"add_{c}" for c in _COUNTERS), 0)
        of_shard["add_" + _COUNTER_OF[row.status]] += 1
        of_shard["add_prompt_tokens"] += row.prompt_tokens
        of_shard["add_cached_tokens"] += row.cached_tokens
        of_shard["add_output_tokens"] += row.output_tokens
        of_shard["add_transfer_bytes"] += row.transfer_bytes
        if row.times is not None:
            for stage in _STAGES:
                of_shard["add_" + stage] += getattr(row.times, stage)
    return sums


def _rows_in(sums: dict[str, float]) -> int:
    return int(sum(sums["add_" + name] for name in _COUNTER_OF.values()))


def error_row(
    request: int, shard: int, key: str, error: RequestError, status: ResultStatus
) -> Terminal:
    """The terminal row of a request that ends in `error`."""
    return Terminal(request, shard, status, _encode_json(RequestOutput(key=key, error=error)))


def end_requests(
    db: Database, conn: Connection, where: ColumnElement[bool], error: RequestError
) -> int:
    """A FAILED row with `error` for the requests `where` that have none. The caller holds the
    locks of their shards. Returns how many."""
    query = select(REQUESTS.c.id, REQUESTS.c.shard_id, REQUESTS.c.line).where(where, without_row())
    open_requests = conn.execute(query).all()
    jobs = db.job_ids(conn, {job_no_of(row.id) for row in open_requests})
    rows = [
        error_row(
            row.id,
            row.shard_id,
            request_key(jobs[job_no_of(row.id)], request_index_of(row.id)),
            msgspec.structs.replace(error, line=row.line),
            ResultStatus.FAILED,
        )
        for row in open_requests
    ]
    return write_rows(db, conn, rows)


# --- shards and jobs that end


def _finish_shards(db: Database, conn: Connection, shards: Sequence[ShardRow], now: float) -> None:
    for shard in shards:
        check_shard_move(shard.state, ShardState.DONE)
    ids = [shard.id for shard in shards]
    done = {"state": str(ShardState.DONE), "claimed_by": None, "finished_at": now}
    conn.execute(update(SHARDS).where(is_in(SHARDS.c.id, ids)).values(done))
    _end_attempts(db, conn, ids, AttemptState.SUCCEEDED, now)


def _end_attempts(
    db: Database, conn: Connection, shards: Collection[int], state: AttemptState, now: float
) -> None:
    running = and_(is_in(ATTEMPTS.c.shard_id, shards), ATTEMPTS.c.state == AttemptState.RUNNING)
    conn.execute(update(ATTEMPTS).where(running).values(state=str(state), ended_at=now))


def finish_jobs(db: Database, conn: Connection, numbers: Collection[int]) -> None:
    """Ends those jobs of which no shard is open: in the state that an ending asks for, else
    COMPLETED. Jobs whose input is still being read wait for it."""
    for no in sorted(numbers):
        query = select(JOBS.c.state, JOBS.c.ending).where(JOBS.c.no == no)
        job = conn.execute(query.with_for_update(key_share=True)).one()
        state = JobState(job.state)
        being_read = state is JobState.VALIDATING and job.ending is None
        if state in TERMINAL_JOB_STATES or being_read or has_open_shard(conn, no):
            continue
        final = JobState(job.ending or JobState.COMPLETED)
        check_job_move(state, final)
        ended = {"state": str(final), "finished_at": db.dialect.now(conn)}
        conn.execute(update(JOBS).where(JOBS.c.no == no).values(ended))


def has_open_shard(conn: Connection, job_no: int) -> bool:
    """True while a shard of the job is not DONE."""
    query = select(SHARDS.c.id).where(SHARDS.c.job_no == job_no, SHARDS.c.state.in_(OPEN_STATES))
    return conn.execute(query.limit(1)).first() is not None


# --- work that comes back


def put_back(
    db: Database, conn: Connection, shards: Sequence[ShardRow], ended_as: AttemptState
) -> None:
    """CLAIMED or HANDED_OFF to PENDING with the next attempt. The caller holds the locks."""
    if not shards:
        return
    for shard in shards:
        check_shard_move(shard.state, ShardState.PENDING)
    ids = [shard.id for shard in shards]
    pending = {
        "state": str(ShardState.PENDING),
        "attempt": SHARDS.c.attempt + 1,
        "claimed_by": None,
        "claim_token": None,
        "queued_at": None,
    }
    conn.execute(update(SHARDS).where(is_in(SHARDS.c.id, ids)).values(pending))
    _end_attempts(db, conn, ids, ended_as, db.dialect.now(conn))


def count_loss(
    db: Database, conn: Connection, requests: Collection[int], max_attempts: int
) -> None:
    """Counts a lost owner against these requests, which have no row; those that were lost
    `max_attempts` times get a `batch_failed` row. The caller holds the locks of their shards."""
    if not requests:
        return
    counted = conn.execute(
        update(REQUESTS)
        .where(is_in(REQUESTS.c.id, requests))
        .values(num_retries=REQUESTS.c.num_retries + 1)
        .returning(REQUESTS.c.id, REQUESTS.c.num_retries)
    )
    spent = [row.id for row in counted if row.num_retries >= max_attempts]
    if spent:
        error = RequestError(
            code="batch_failed",
            message=f"Its worker was lost {max_attempts} times, so it was given up; "
            "see the workers' logs, then submit it again.",
        )
        end_requests(db, conn, is_in(REQUESTS.c.id, spent), error)
