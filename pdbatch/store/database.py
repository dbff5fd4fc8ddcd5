"""Connections and transactions, the same for SQLite and PostgreSQL.

`read` runs single statements, each with its own snapshot; `write` runs one transaction and runs
it again when it was lost: so what it runs must do no harm when it had been committed already.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from sqlalchemy import URL, Connection, make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from pdbatch.errors import ConfigError, StoreError, UnknownJob
from pdbatch.ids import JobId
from pdbatch.store.dialects import Dialect, Postgres, Sqlite
from pdbatch.store.idsets import is_in
from pdbatch.store.models import JOBS

T = TypeVar("T")
_CACHED_JOBS = 10_000


class Database:
    """Connections to one database; safe to share among threads, not over a fork."""

    def __init__(self, url: str, *, retry_s: float = 30.0) -> None:
        """Connects to nothing yet. Raises ConfigError for a URL of another kind."""
        parsed = parse_url(url)
        self.shown_url = parsed.render_as_string(hide_password=True)
        self.dialect: Dialect = (
            Sqlite(parsed) if parsed.get_backend_name() == "sqlite" else Postgres(parsed)
        )
        self._retry_s = retry_s
        self.engine = self.dialect.engine()
        self._reads = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._job_nos: dict[JobId, int] = {}
        self._job_ids: dict[int, JobId] = {}

    def read(self, fn: Callable[[Connection], T], *, retry: bool = True) -> T:
        """`fn` on a connection without a transaction. Raises StoreError as `write` does."""

        def once() -> T:
            with self._reads.connect() as conn:
                return fn(conn)

        return self._persist(once, self._retry_s if retry else 0.0)

    def write(self, fn: Callable[[Connection], T]) -> T:
        """`fn` in one transaction, committed when it returns.

        Raises StoreError when the database refuses, or stays unreachable or busy for `retry_s`."""

        def once() -> T:
            with self.engine.begin() as conn:
                return fn(conn)

        return self._persist(once, self._retry_s)

    def _persist(self, once: Callable[[], T], retry_s: float) -> T:
        give_up_at = time.monotonic() + retry_s
        pause_s = 0.01
        while True:
            try:
                return once()
            except Exception as error:
                if isinstance(error, StoreError) or not self._is_of_database(error):
                    raise
                transient = self.dialect.is_transient(error)
                if not transient or time.monotonic() + pause_s > give_up_at:
                    raise self._store_error(error, transient) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 1.0)

    def _is_of_database(self, error: Exception) -> bool:
        return isinstance(error, SQLAlchemyError) or hasattr(error, "sqlstate")

    def _store_error(self, error: Exception, transient: bool) -> StoreError:
        cause = getattr(error, "orig", None) or error
        text = str(cause).strip().splitlines() or [type(cause).__name__]
        remedy = "see that the database runs and can be reached" if transient else None
        return StoreError(f"{self.shown_url}: {text[0]}", remedy=remedy)

    def now(self) -> float:
        """The database's clock, in seconds since the epoch."""
        return self.read(self.dialect.now)

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    # --- numbers of jobs never change, so they are looked up once

    def job_no(self, conn: Connection, job: JobId) -> int:
        """The job's number in keys. Raises UnknownJob."""
        known = self._job_nos.get(job)
        if known is not None:
            return known
        number = conn.execute(select(JOBS.c.no).where(JOBS.c.id == job)).scalar_one_or_none()
        if number is None:
            raise UnknownJob(f"there is no job {job}")
        self._remember(job, number)
        return int(number)

    def job_ids(self, conn: Connection, numbers: Collection[int]) -> dict[int, JobId]:
        """The ids of jobs by their numbers."""
        cached = {no: self._job_ids.get(no) for no in numbers}
        found = {no: job for no, job in cached.items() if job is not None}
        unknown = cached.keys() - found.keys()
        if unknown:
            wanted = is_in(JOBS.c.no, unknown)
            for no, job in conn.execute(select(JOBS.c.no, JOBS.c.id).where(wanted)):
                self._remember(job, no)
                found[no] = job
        return found

    def _remember(self, job: JobId, number: int) -> None:
        if len(self._job_nos) >= _CACHED_JOBS:
            self._job_nos.clear()
            self._job_ids.clear()
        self._job_nos[job] = number
        self._job_ids[number] = job


def parse_url(url: str) -> URL:
    """The URL with the driver that pdbatch uses. Raises ConfigError for other databases."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"database_url cannot be read: {error}") from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError(
                "database_url names no file", remedy="write sqlite:////absolute/path/pdbatch.db"
            )
        return parsed.set(drivername="sqlite")
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ConfigError(f"database_url names {backend}", remedy="use sqlite:/// or postgresql://")
