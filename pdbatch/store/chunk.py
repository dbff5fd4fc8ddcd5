"""One group of ingested lines, and the transaction that writes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from pdbatch.errors import IllegalTransition
from pdbatch.states import JobState, ShardState
from pdbatch.store.database import Database
from pdbatch.store.dialects import RequestTuple
from pdbatch.store.ledger import Terminal, result_tuple
from pdbatch.store.models import JOBS, REQUESTS, SHARDS
from pdbatch.store.rows import storable


@dataclass(slots=True)
class OpenShard:
    """A shard that still takes lines of its model."""

    id: int
    model: str
    num_requests: int = 0
    num_rejected: int = 0


@dataclass(slots=True)
class Chunk:
    """What the next transaction writes."""

    requests: list[RequestTuple] = field(default_factory=list)
    rejects: list[Terminal] = field(default_factory=list)
    shards: dict[int, OpenShard] = field(default_factory=dict)
    """Those with a new line in this chunk; their counts are absolute."""
    num_bytes: int = 0

    def add(self, request: RequestTuple) -> None:
        """A request and its size."""
        self.requests.append(request)
        body = request[6]
        self.num_bytes += 0 if body is None else len(body)


def write_chunk(db: Database, conn: Connection, job_no: int, chunk: Chunk) -> None:
    """Writes a chunk, unless it was committed already by a try whose answer was lost.

    Raises IllegalTransition when the job is no longer VALIDATING."""
    query = select(JOBS.c.state, JOBS.c.ending).where(JOBS.c.no == job_no)
    job = conn.execute(query.with_for_update(read=True)).one()
    if job.state != JobState.VALIDATING or job.ending is not None:
        raise IllegalTransition(f"the job is {job.ending or job.state} and takes no more lines")
    first = chunk.requests[0][0]
    if conn.execute(select(REQUESTS.c.id).where(REQUESTS.c.id == first)).first() is not None:
        return
    _put_shards(conn, job_no, chunk)
    db.dialect.insert_requests(conn, chunk.requests)
    if chunk.rejects:
        now = db.dialect.now(conn)
        db.dialect.insert_results(conn, [result_tuple(row, now, None) for row in chunk.rejects])


def _put_shards(conn: Connection, job_no: int, chunk: Chunk) -> None:
    zeros = {
        column.name: 0 for column in SHARDS.c if not column.nullable and column.name not in _GIVEN
    }
    values = [
        {
            **zeros,
            "id": shard.id,
            "job_no": job_no,
            "model": storable(shard.model),
            "state": str(ShardState.PENDING),
            "attempt": 1,
            "num_requests": shard.num_requests,
            "num_rejected": shard.num_rejected,
        }
        for shard in chunk.shards.values()
    ]
    insert = postgresql.insert if conn.dialect.name == "postgresql" else sqlite.insert
    put = insert(SHARDS)
    counts = {name: put.excluded[name] for name in ("num_requests", "num_rejected")}
    conn.execute(put.on_conflict_do_update(index_elements=[SHARDS.c.id], set_=counts), values)


_GIVEN = frozenset({"id", "job_no", "model", "state", "attempt", "num_requests", "num_rejected"})
