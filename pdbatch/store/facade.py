"""The one object through which everybody reaches the database."""

from __future__ import annotations

from types import TracebackType

from pdbatch.ids import JobId
from pdbatch.store.database import Database
from pdbatch.store.holds import Holds
from pdbatch.store.ingest import Ingest
from pdbatch.store.jobs import Jobs
from pdbatch.store.results import Results
from pdbatch.store.schema import check
from pdbatch.store.shards import Shards
from pdbatch.store.workers import Workers


class Store:
    """Jobs, shards, holds, results and workers of one database. Safe to share among threads.

    Not to be carried over a fork: open one in each process. Every write is one transaction,
    tried again after a deadlock, a busy database or a dropped connection (for up to
    `retry_s`), and does no harm when it runs twice. Raises StoreError where that is in vain.
    """

    jobs: Jobs
    shards: Shards
    holds: Holds
    results: Results
    workers: Workers

    def __init__(self, database: Database, *, max_attempts: int = 10) -> None:
        self._database = database
        self.jobs = Jobs(database)
        self.shards = Shards(database, max_attempts=max_attempts)
        self.holds = Holds(database, max_attempts=max_attempts)
        self.results = Results(database)
        self.workers = Workers(database, max_attempts=max_attempts)

    @classmethod
    def open(cls, url: str, *, max_attempts: int = 10, retry_s: float = 30.0) -> Store:
        """A store on an existing, up-to-date database; one short query.

        `max_attempts`: after so many lost owners a request gets a `batch_failed` row.
        Raises StoreError, with the remedy `pdbatch db upgrade`, for a missing database or
        another revision.
        """
        database = Database(url, retry_s=retry_s)
        try:
            check(url, database=database)
        except BaseException:
            database.close()
            raise
        return cls(database, max_attempts=max_attempts)

    @property
    def writes_side_by_side(self) -> bool:
        """Whether transactions that write need not wait for each other."""
        return self._database.engine.dialect.name == "postgresql"

    @property
    def url(self) -> str:
        """The database's URL, its password hidden."""
        return self._database.shown_url

    def ingest(self, job: JobId, *, shard_size: int = 64, default_model: str) -> Ingest:
        """Takes the lines of a VALIDATING job in; see `Ingest`. `default_model` serves lines
        that name none where the job names none."""
        return Ingest(
            self._database, self.jobs, job, shard_size=shard_size, default_model=default_model
        )

    def now(self) -> float:
        """The database's clock."""
        return self._database.now()

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
