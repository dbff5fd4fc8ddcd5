"""Taking the lines of a job in, in constant memory."""

from __future__ import annotations

from types import TracebackType

from pdbatch.ids import JobId
from pdbatch.store.database import Database
from pdbatch.store.jobs import Jobs
from pdbatch.store.rows import IngestRow


class Ingest:
    """Context manager: `with store.ingest(...) as ingest: ingest.add(row)`.

    1. `add` gathers rows; every 5,000 rows (or 16 MiB) are written in one transaction, into
       shards of one model each. Rejects get their terminal row with them.
    2. Leaving the block without an error closes: the last rows are written, lines whose
       custom_id was used before are rejected (`duplicate_custom_id`), the job is activated.
    3. Leaving it by an exception fails the job with the exception's text.

    Raises IllegalTransition from `add` or `close` when the job was ended meanwhile.
    """

    def __init__(
        self, database: Database, jobs: Jobs, job: JobId, *, shard_size: int, default_model: str
    ) -> None:
        self._db = database
        self._jobs = jobs
        self.job = job
        self.num_rows = 0
        """Rows added so far."""

    def add(self, row: IngestRow) -> None:
        """The next line; indexes rise by one, from 0."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes what is left, rejects duplicates, activates the job. Once only."""
        raise NotImplementedError

    def __enter__(self) -> Ingest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        raise NotImplementedError
