"""Results: written once, read in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Row, Select, literal_column, select

from pdbatch.errors import StoreError
from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.states import ResultStatus
from pdbatch.store import ledger, locks
from pdbatch.store.database import Database
from pdbatch.store.keys import job_range, request_index_of, row_id
from pdbatch.store.models import REQUESTS, RESULTS, SHARDS
from pdbatch.store.rows import ResultRow, StoredResult, storable

_FIRST_PAGE_ROWS = 64
_PAGE_BYTES = 8 * 2**20
_QUERY: Select[Any] = (
    select(
        RESULTS.c.id,
        REQUESTS.c.custom_id,
        REQUESTS.c.endpoint,
        SHARDS.c.model,
        RESULTS.c.status,
        RESULTS.c.body,
        RESULTS.c.prompt_tokens,
        RESULTS.c.cached_tokens,
        RESULTS.c.output_tokens,
        RESULTS.c.finish_reason,
        RESULTS.c.finished_at,
    )
    .join_from(RESULTS, REQUESTS, REQUESTS.c.id == RESULTS.c.id)
    .join(SHARDS, SHARDS.c.id == REQUESTS.c.shard_id)
    .order_by(RESULTS.c.id)
)


class Results:
    """`store.results`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def write(self, worker: WorkerId | None, rows: Sequence[ResultRow]) -> int:
        """Writes terminal rows; returns how many were new. A request that has a row keeps it.

        In the same transaction: counters of the shards, end of the holds, end of the shards and
        jobs that are complete. `worker` is noted, not checked: a result that a fenced
        worker computed is as good as another. Best in groups of up to 512.
        Raises UnknownJob, StoreError for an index that the job does not have."""

        def run(conn: Connection) -> int:
            terminal = self._terminal(conn, rows)
            return ledger.write_rows(self._db, conn, terminal, worker)

        return self._db.write(run) if rows else 0

    def _terminal(self, conn: Connection, rows: Sequence[ResultRow]) -> list[ledger.Terminal]:
        numbers = {job: self._db.job_no(conn, job) for job in {row.job for row in rows}}
        ids = [row_id(numbers[row.job], row.index) for row in rows]
        shards = locks.shards_of(conn, ids)
        terminal = []
        for id_, row in zip(ids, rows, strict=True):
            if id_ not in shards:
                raise StoreError(f"job {row.job} has no request {row.index}")
            terminal.append(
                ledger.Terminal(
                    id_,
                    shards[id_],
                    row.status,
                    row.body,
                    row.prompt_tokens,
                    row.cached_tokens,
                    row.output_tokens,
                    storable(row.finish_reason),
                    row.times,
                    row.transfer_bytes,
                )
            )
        return terminal

    def iterate(
        self,
        job: JobId,
        status: ResultStatus | Collection[ResultStatus] | None = None,
        after: int = -1,
        page: int = 1000,
    ) -> Iterator[StoredResult]:
        """Rows in index order, those above `after`, of one status or of several where given.

        Constant memory: pages of at most `page` rows and about 8 MiB; no transaction stays open
        between them. Works while the job runs. Raises UnknownJob when first asked for a row."""
        no = self._db.read(lambda conn: self._db.job_no(conn, job))
        first, last = job_range(no)
        query = _of_status(_QUERY.where(RESULTS.c.id <= last), status)
        reached = first + after
        limit = min(page, _FIRST_PAGE_ROWS)
        while True:
            turned = query.where(RESULTS.c.id > reached).limit(limit)
            rows = self._db.read(partial(_fetch, query=turned))
            yield from (_stored(job, row) for row in rows)
            if len(rows) < limit:
                return
            reached = rows[-1].id
            mean_bytes = sum(len(row.body) for row in rows) // len(rows) + 1
            limit = max(1, min(page, _PAGE_BYTES // mean_bytes, 4 * limit))

    def get(self, job: JobId, index: RequestIndex | int) -> StoredResult | None:
        """The row of one request, or None while it has none. Raises UnknownJob."""

        def run(conn: Connection) -> StoredResult | None:
            id_ = row_id(self._db.job_no(conn, job), index)
            rows = _fetch(conn, _QUERY.where(RESULTS.c.id == id_))
            return _stored(job, rows[0]) if rows else None

        return self._db.read(run)


def _fetch(conn: Connection, query: Select[Any]) -> Sequence[Row[Any]]:
    return conn.execute(query).all()


def _of_status(
    query: Select[Any], status: ResultStatus | Collection[ResultStatus] | None
) -> Select[Any]:
    if status is None:
        return query
    wanted = {ResultStatus(status)} if isinstance(status, str) else set(status)
    if ResultStatus.SUCCEEDED not in wanted:  # said so that the index of errors is used
        query = query.where(RESULTS.c.status != literal_column("'succeeded'"))
    return query.where(RESULTS.c.status.in_(sorted(str(one) for one in wanted)))


def _stored(job: JobId, row: Row[Any]) -> StoredResult:
    id_, custom_id, endpoint, model, status, *rest = tuple(row)
    index = request_index_of(id_)
    return StoredResult(job, index, custom_id, endpoint, model, ResultStatus(status), *rest)
