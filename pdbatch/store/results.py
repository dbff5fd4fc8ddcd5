"""Results: written once, read in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.states import ResultStatus
from pdbatch.store.database import Database
from pdbatch.store.rows import ResultRow, StoredResult


class Results:
    """`store.results`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def write(self, worker: WorkerId | None, rows: Sequence[ResultRow]) -> int:
        """Writes terminal rows; returns how many were new. A request that has a row keeps it.

        In the same transaction: counters of the shards, end of the holds, end of the shards and
        jobs that are complete. `worker` is noted, not checked: a result that a fenced
        worker computed is as good as another. Best in groups of up to 512."""
        raise NotImplementedError

    def iterate(
        self,
        job: JobId,
        status: ResultStatus | None = None,
        after: int = -1,
        page: int = 1000,
    ) -> Iterator[StoredResult]:
        """Rows in index order, those above `after`, of one status where it is given. Constant
        memory: pages of at most `page` rows and about 8 MiB; no transaction stays open.
        Works while the job runs. Raises UnknownJob when first asked for a row."""
        raise NotImplementedError

    def get(self, job: JobId, index: RequestIndex | int) -> StoredResult | None:
        """The row of one request, or None while it has none. Raises UnknownJob."""
        raise NotImplementedError
