"""Jobs: made, read, activated, ended."""

from __future__ import annotations

import builtins
from collections.abc import Collection

from pdbatch.ids import JobId
from pdbatch.states import JobState
from pdbatch.store.database import Database
from pdbatch.store.rows import JobView, NewJob


class Jobs:
    """`store.jobs`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, job: NewJob) -> JobId:
        """A new job, VALIDATING, without requests."""
        raise NotImplementedError

    def get(self, job: JobId) -> JobView:
        """The job with its counts rolled up from its shards. Raises UnknownJob."""
        raise NotImplementedError

    def list(
        self, limit: int = 50, states: Collection[JobState] | None = None
    ) -> builtins.list[JobView]:
        """The newest jobs first, of these states only where some are given."""
        raise NotImplementedError

    def states(self, jobs: Collection[JobId]) -> dict[JobId, JobState]:
        """The states of these jobs; unknown ones are left out. Cheap: no counts."""
        raise NotImplementedError

    def activate(self, job: JobId) -> JobState:
        """VALIDATING to IN_PROGRESS; to COMPLETED at once where no request is left to run.
        Does nothing where the job is past VALIDATING. Raises UnknownJob."""
        raise NotImplementedError

    def fail(self, job: JobId, message: str) -> JobState:
        """VALIDATING to FAILED: the input could not be taken in. Lines that were taken in get
        `batch_failed` rows. Raises UnknownJob, IllegalTransition once the job is in progress."""
        raise NotImplementedError

    def cancel(self, job: JobId) -> JobState:
        """Ends the job: requests without a row get a `batch_cancelled` row.

        Returns CANCELLED, or the terminal state that the job had already. Works in groups of
        shards; `sweep` finishes what a killed canceller left. Raises UnknownJob."""
        raise NotImplementedError

    def sweep(self) -> builtins.list[JobId]:
        """For reconcilers, any number of them: expires jobs whose deadline passed (rows
        `batch_expired`) and finishes endings that were interrupted. Returns the jobs ended."""
        raise NotImplementedError
