"""The locks of a transaction, and what may be asked once they are held.

Who changes a row, a hold, or the owner of a request holds the lock of its shard's row. Locks are
taken in this order, so that no two transactions wait for each other:

    1. the worker's row     shared by those that work in its name, alone by those that end its life
    2. shards' rows         in the order of their ids
    3. jobs' rows           in the order of their numbers, last, and only to end the job

On SQLite the whole transaction holds the one write lock and the rest follows.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from sqlalchemy import ColumnElement, Connection, bindparam, select
from sqlalchemy import exists as sql_exists

from pdbatch.ids import WorkerId
from pdbatch.states import JobState, ShardState
from pdbatch.store.idsets import is_in
from pdbatch.store.models import HOLDS, JOBS, REQUESTS, RESULTS, SHARDS, WORKERS


class ShardRow(msgspec.Struct, frozen=True):
    """A shard as it stands under its lock."""

    id: int
    state: ShardState
    attempt: int
    claimed_by: str | None
    claim_token: str | None
    model: str
    num_requests: int
    num_done: int


_LIVING = (
    select(WORKERS.c.id)
    .where(WORKERS.c.id == bindparam("worker"), WORKERS.c.state == "live")
    .with_for_update(read=True, key_share=True)
    .cte("living")
)
_SHARDS = (
    select(
        SHARDS.c.id,
        SHARDS.c.state,
        SHARDS.c.attempt,
        SHARDS.c.claimed_by,
        SHARDS.c.claim_token,
        SHARDS.c.model,
        SHARDS.c.num_requests,
        (SHARDS.c.num_succeeded + SHARDS.c.num_rejected + SHARDS.c.num_failed).label("num_done"),
    )
    .where(is_in(SHARDS.c.id, "ids"))
    .order_by(SHARDS.c.id)
    .with_for_update(key_share=True)
)
_SHARDS_OF = select(REQUESTS.c.id, REQUESTS.c.shard_id).where(is_in(REQUESTS.c.id, "ids"))
_SHARDS_FOR = _SHARDS_OF.where(select(_LIVING.c.id).exists())
_PRIORITY_FOR = select(JOBS.c.priority).where(
    JOBS.c.no == bindparam("no"),
    JOBS.c.state == JobState.IN_PROGRESS,
    JOBS.c.ending.is_(None),
    select(_LIVING.c.id).exists(),
)


def priority_for(conn: Connection, worker: WorkerId, job_no: int) -> int | None:
    """The job's priority, or None where the job is over or being ended, or `worker` is not live;
    if it is, it stays so until this transaction ends."""
    given = {"worker": worker, "no": job_no}
    return conn.execute(_PRIORITY_FOR, given).scalar_one_or_none()


def shards_for(conn: Connection, worker: WorkerId, requests: Collection[int]) -> dict[int, int]:
    """As `shards_of`, but nothing where `worker` is not live; if it is, it stays so until this
    transaction ends."""
    found = conn.execute(_SHARDS_FOR, {"ids": requests, "worker": worker})
    return {row[0]: row[1] for row in found}


def lock_shards(conn: Connection, ids: Collection[int]) -> dict[int, ShardRow]:
    """The shards' rows, locked until this transaction ends."""
    if not ids:
        return {}
    found = conn.execute(_SHARDS, {"ids": ids})
    return {row[0]: ShardRow(row[0], ShardState(row[1]), *row[2:]) for row in found}


def shards_of(conn: Connection, requests: Collection[int]) -> dict[int, int]:
    """The shard of each request that there is."""
    found = conn.execute(_SHARDS_OF, {"ids": requests})
    return {row[0]: row[1] for row in found}


def without_row() -> ColumnElement[bool]:
    """Requests that have no terminal row."""
    return ~sql_exists().where(RESULTS.c.id == REQUESTS.c.id)


def without_holder() -> ColumnElement[bool]:
    """Requests that no decode worker holds."""
    return ~sql_exists().where(HOLDS.c.id == REQUESTS.c.id)


def unheld_requests(conn: Connection, shards: Collection[int]) -> list[int]:
    """Requests of these shards with neither a row nor a holder."""
    if not shards:
        return []
    return list(conn.execute(_UNHELD, {"shards": shards}).scalars())


_UNHELD = select(REQUESTS.c.id).where(
    is_in(REQUESTS.c.shard_id, "shards"), without_row(), without_holder()
)
