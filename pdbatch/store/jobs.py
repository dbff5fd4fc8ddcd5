"""Jobs: made, read, activated, ended.

The end of a job that a user cancels, that expires or whose input fails has three steps, each
a transaction of its own: `ending` is noted, so that nothing new is published, claimed or taken
in; requests without a row get one, group of shards by group; the last of them ends the job. A
canceller that is killed in between leaves the rest to `sweep`.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection

from sqlalchemy import ColumnElement, Connection, Select, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from pdbatch.errors import IllegalTransition
from pdbatch.ids import JobId, new_job_id
from pdbatch.request import RequestError
from pdbatch.states import TERMINAL_JOB_STATES, JobState, ShardState, check_job_move
from pdbatch.store import ledger, locks
from pdbatch.store.database import Database
from pdbatch.store.idsets import is_in
from pdbatch.store.jobviews import view_jobs
from pdbatch.store.keys import job_range
from pdbatch.store.models import JOBS, REQUESTS, SHARDS
from pdbatch.store.rows import JobView, NewJob, storable

_SHARDS_AT_ONCE = 64


class Jobs:
    """`store.jobs`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, job: NewJob, *, id: JobId | None = None) -> JobId:
        """A new job, VALIDATING, without requests. One that has the given `id` already stays as it
        is; None: a fresh id."""
        job_id = id or new_job_id()

        def run(conn: Connection) -> JobId:
            now = self._db.dialect.now(conn)
            if conn.execute(select(JOBS.c.no).where(JOBS.c.id == job_id)).first() is None:
                values = {
                    "id": job_id,
                    "state": str(JobState.VALIDATING),
                    "model": storable(job.model),
                    "endpoint": storable(job.endpoint),
                    "priority": job.priority,
                    "weight": job.weight,
                    "input_name": storable(job.input_name),
                    "metadata": dict(job.metadata),
                    "created_at": now,
                    "deadline_at": job.deadline_at,
                    "heard_at": now,
                }
                insert = postgresql.insert if conn.dialect.name == "postgresql" else sqlite.insert
                put = insert(JOBS).values(values)
                conn.execute(put.on_conflict_do_nothing(index_elements=[JOBS.c.id]))
            return job_id

        return self._db.write(run)

    def get(self, job: JobId) -> JobView:
        """The job with its counts rolled up from its shards. Raises UnknownJob."""

        def run(conn: Connection) -> JobView:
            no = self._db.job_no(conn, job)
            return view_jobs(conn, JOBS.c.no == no, limit=1)[0]

        return self._db.read(run)

    def list(
        self, limit: int = 50, states: Collection[JobState] | None = None
    ) -> builtins.list[JobView]:
        """The newest jobs first, of these states only where some are given."""
        where = None if states is None else JOBS.c.state.in_([str(state) for state in states])
        return self._db.read(lambda conn: view_jobs(conn, where, limit))

    def states(self, jobs: Collection[JobId]) -> dict[JobId, JobState]:
        """The states of these jobs; unknown ones are left out. Cheap: no counts."""

        def run(conn: Connection) -> dict[JobId, JobState]:
            rows = conn.execute(select(JOBS.c.id, JOBS.c.state).where(JOBS.c.id.in_(jobs)))
            return {job: JobState(state) for job, state in rows}

        return self._db.read(run)

    def hear(self, job: JobId) -> None:
        """A sign of life of who takes its lines in; nothing where that is over."""

        def run(conn: Connection) -> None:
            values = {"heard_at": self._db.dialect.now(conn)}
            conn.execute(
                update(JOBS)
                .where(JOBS.c.id == job, JOBS.c.state == JobState.VALIDATING)
                .values(values)
            )

        self._db.write(run)

    def activate(self, job: JobId) -> JobState:
        """VALIDATING to IN_PROGRESS; to COMPLETED at once where no request is left to run.

        Does nothing where the job is past VALIDATING, or is being ended. Raises UnknownJob."""
        self._db.write(lambda conn: self._finish_all_rejected(conn, job))

        def run(conn: Connection) -> JobState:
            no = self._db.job_no(conn, job)
            state, ending = self._lock(conn, no)
            if state is not JobState.VALIDATING or ending is not None:
                return state
            new = JobState.IN_PROGRESS if ledger.has_open_shard(conn, no) else JobState.COMPLETED
            check_job_move(state, new)
            now = self._db.dialect.now(conn)
            finished_at = now if new is JobState.COMPLETED else None
            values = {"state": str(new), "started_at": now, "finished_at": finished_at}
            conn.execute(update(JOBS).where(JOBS.c.no == no).values(values))
            return new

        return self._db.write(run)

    def _finish_all_rejected(self, conn: Connection, job: JobId) -> None:
        first, last = job_range(self._db.job_no(conn, job))
        self._finish_rejected(conn, SHARDS.c.id.between(first, last))

    def _finish_rejected(self, conn: Connection, shards: ColumnElement[bool]) -> None:
        """Shards of which every line was rejected have nothing to run."""
        complete = SHARDS.c.num_rejected + SHARDS.c.num_failed == SHARDS.c.num_requests
        conn.execute(
            update(SHARDS)
            .where(shards, SHARDS.c.state == ShardState.PENDING, complete)
            .values(state=str(ShardState.DONE), finished_at=self._db.dialect.now(conn))
        )

    def fail(self, job: JobId, message: str) -> JobState:
        """VALIDATING to FAILED: the input could not be taken in. Lines that were taken in get
        `batch_failed` rows. Raises UnknownJob, IllegalTransition once the job is in progress."""

        def run(conn: Connection) -> JobState:
            no = self._db.job_no(conn, job)
            state, ending = self._lock(conn, no)
            if state is JobState.FAILED:
                return state
            check_job_move(state, JobState.FAILED)
            if ending is None:
                values = {"ending": str(JobState.FAILED), "error": storable(message)}
                conn.execute(update(JOBS).where(JOBS.c.no == no).values(values))
            return state

        self._db.write(run)
        return self._end(job)

    def cancel(self, job: JobId) -> JobState:
        """Ends the job: requests without a row get a `batch_cancelled` row.

        Returns CANCELLED, or the terminal state that the job had already or came to first.
        Works in groups of shards; `sweep` finishes what a killed canceller left.
        Raises UnknownJob."""

        def run(conn: Connection) -> JobState:
            no = self._db.job_no(conn, job)
            state, ending = self._lock(conn, no)
            if state in TERMINAL_JOB_STATES or ending is not None:
                return state
            values = {"ending": str(JobState.CANCELLED)}
            if state is JobState.IN_PROGRESS:
                check_job_move(state, JobState.CANCELLING)
                values["state"] = str(JobState.CANCELLING)
            conn.execute(update(JOBS).where(JOBS.c.no == no).values(values))
            return state

        state = self._db.write(run)
        return state if state in TERMINAL_JOB_STATES else self._end(job)

    def sweep(self, silent_s: float | None = None) -> builtins.list[JobId]:
        """For reconcilers, any number of them: expires jobs whose deadline passed (rows
        `batch_expired`), fails those whose submitter was not heard of for `silent_s` (rows
        `batch_failed`), finishes endings that were interrupted. Returns the jobs ended."""
        if self._is_any(_due):
            self._db.write(self._note_expiry)
        if silent_s is not None and self._is_any(lambda now: _silent(now - silent_s)):
            self._db.write(lambda conn: self._note_silence(conn, silent_s))

        def unfinished(conn: Connection) -> builtins.list[JobId]:
            still = [state for state in JobState if state not in TERMINAL_JOB_STATES]
            query = select(JOBS.c.id).where(
                JOBS.c.state.in_([str(state) for state in still]), JOBS.c.ending.is_not(None)
            )
            return list(conn.execute(query).scalars())

        jobs = self._db.read(unfinished)
        return [job for job in jobs if self._end(job) in TERMINAL_JOB_STATES]

    def _is_any(self, query: Callable[[float], Select[tuple[int]]]) -> bool:
        def run(conn: Connection) -> bool:
            return conn.execute(query(self._db.dialect.now(conn)).limit(1)).first() is not None

        return self._db.read(run)

    def _note_expiry(self, conn: Connection) -> None:
        query = _due(self._db.dialect.now(conn)).order_by(JOBS.c.no)
        numbers = conn.execute(query.with_for_update(key_share=True)).scalars().all()
        for no in numbers:
            values = {"ending": str(JobState.EXPIRED)}
            conn.execute(update(JOBS).where(JOBS.c.no == no).values(values))

    def _note_silence(self, conn: Connection, silent_s: float) -> None:
        query = _silent(self._db.dialect.now(conn) - silent_s).order_by(JOBS.c.no)
        numbers = conn.execute(query.with_for_update(key_share=True)).scalars().all()
        message = f"its submitter has not been heard of for {silent_s:.0f} seconds"
        for no in numbers:
            values = {"ending": str(JobState.FAILED), "error": message}
            conn.execute(update(JOBS).where(JOBS.c.no == no).values(values))

    def _lock(self, conn: Connection, no: int) -> tuple[JobState, str | None]:
        query = select(JOBS.c.state, JOBS.c.ending).where(JOBS.c.no == no)
        row = conn.execute(query.with_for_update(key_share=True)).one()
        return JobState(row.state), row.ending

    def _end(self, job: JobId) -> JobState:
        """Brings a job with an ending to it; returns its state then."""

        def run(conn: Connection) -> JobState | None:
            no = self._db.job_no(conn, job)
            noted = conn.execute(select(JOBS.c.ending, JOBS.c.error).where(JOBS.c.no == no)).one()
            query = select(SHARDS.c.id).where(
                SHARDS.c.job_no == no, SHARDS.c.state.in_(ledger.OPEN_STATES)
            )
            ids = conn.execute(query.order_by(SHARDS.c.id).limit(_SHARDS_AT_ONCE)).scalars().all()
            if ids:
                locks.lock_shards(conn, ids)
                requests = is_in(REQUESTS.c.shard_id, ids)
                ledger.end_requests(self._db, conn, requests, ending_error(noted.ending, noted[1]))
                self._finish_rejected(conn, is_in(SHARDS.c.id, ids))
                return None
            ledger.finish_jobs(self._db, conn, {no})
            return JobState(conn.execute(select(JOBS.c.state).where(JOBS.c.no == no)).scalar_one())

        while (state := self._db.write(run)) is None:
            pass
        if state not in TERMINAL_JOB_STATES:
            raise IllegalTransition(f"job {job} is {state} and should have ended")
        return state


def _due(now: float) -> Select[tuple[int]]:
    return select(JOBS.c.no).where(
        JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.ending.is_(None), JOBS.c.deadline_at <= now
    )


def _silent(since: float) -> Select[tuple[int]]:
    """Jobs that are being taken in by somebody who was not heard of since then."""
    heard_at = func.coalesce(JOBS.c.heard_at, JOBS.c.created_at)
    return select(JOBS.c.no).where(
        JOBS.c.state == JobState.VALIDATING, JOBS.c.ending.is_(None), heard_at <= since
    )


def ending_error(ending: str, message: str | None = None) -> RequestError:
    """What the rows say that a job's ending gives to its requests."""
    match JobState(ending):
        case JobState.CANCELLED:
            return RequestError(
                code="batch_cancelled",
                message="The job was cancelled before this request ran; submit it again.",
            )
        case JobState.EXPIRED:
            return RequestError(
                code="batch_expired",
                message="The job's deadline passed before this request ran; submit it again "
                "with a later deadline.",
            )
        case _:
            return RequestError(
                code="batch_failed",
                message=f"The job's input could not be taken in ({message}); submit it again.",
            )
