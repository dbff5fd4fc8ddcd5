"""Where SQLite and PostgreSQL differ: settings, the clock, sets of ids, many rows at once.

SQLite has one writer: `BEGIN IMMEDIATE` takes the one lock, and `FOR UPDATE` means nothing.
PostgreSQL locks rows; see `pdbatch.store.locks` for the order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Float,
    create_engine,
    event,
    literal,
    literal_column,
)

from pdbatch.states import AttemptState, ShardState

BUSY_TIMEOUT_S = 30
_PAGE_BYTES = 8192  # three rows of 2.4 kB fill a page; with 4096 each would waste 40% of its own

RequestTuple = tuple[int, int, int, int, str, str | None, bytes | None]
"""id, shard_id, line, num_retries, endpoint, custom_id, body"""
ResultTuple = tuple[int, str, int, int, int, str | None, float, str | None, bytes]
"""id, status, prompt_tokens, cached_tokens, output_tokens, finish_reason, finished_at,
written_by, body"""

_REQUEST_COLUMNS = "id, shard_id, line, num_retries, endpoint, custom_id, body"
_RESULT_COLUMNS = (
    "id, status, prompt_tokens, cached_tokens, output_tokens, finish_reason, finished_at,"
    " written_by, body"
)
_ATTEMPT_COLUMNS = "shard_id, attempt, worker_id, state, started_at"
_CLAIM = (
    f"UPDATE shards SET state = '{ShardState.CLAIMED}', claimed_by = {{0}}, claim_token = {{0}}"
    f" WHERE id = {{0}} AND attempt = {{0}} AND state = '{ShardState.QUEUED}' RETURNING model"
)


class Dialect(Protocol):
    """What the rest of the store needs of a database."""

    def engine(self) -> Engine:
        """Connects lazily; its transactions are for writing."""
        ...

    def now(self, conn: Connection) -> float:
        """Seconds since the epoch."""
        ...

    def clock(self) -> ColumnElement[float]:
        """The same as an expression, for a statement that writes it."""
        ...

    def insert_requests(self, conn: Connection, rows: Sequence[RequestTuple]) -> None:
        """All of them, or none; they must be new."""
        ...

    def insert_holds(self, conn: Connection, requests: Sequence[int], worker: str) -> None:
        """All of them; they must be free."""
        ...

    def claim_shard(
        self, conn: Connection, shard: int, attempt: int, worker: str, token: str
    ) -> str | None:
        """QUEUED to CLAIMED, locked and its attempt noted as running; the shard's model, or None
        where it is not QUEUED with this attempt."""
        ...

    def insert_results(self, conn: Connection, rows: Sequence[ResultTuple]) -> set[int]:
        """Those whose id has no row yet; returns their ids. Rows come in the order of ids."""
        ...

    def is_transient(self, error: BaseException) -> bool:
        """True when the same transaction may succeed later, on another connection maybe."""
        ...


class Sqlite:
    """A file in WAL mode."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self.path = Path(url.database or "")

    def engine(self) -> Engine:
        engine = create_engine(self._url, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
        return engine

    def now(self, conn: Connection) -> float:
        return time.time()

    def clock(self) -> ColumnElement[float]:
        return literal(time.time(), Float())

    def insert_requests(self, conn: Connection, rows: Sequence[RequestTuple]) -> None:
        sql = f"INSERT INTO requests ({_REQUEST_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        conn.exec_driver_sql(sql, list(rows))

    def insert_holds(self, conn: Connection, requests: Sequence[int], worker: str) -> None:
        sql = "INSERT INTO holds (id, worker_id, taken_at) SELECT value, ?, ? FROM json_each(?)"
        conn.exec_driver_sql(sql, (worker, self.now(conn), json.dumps(requests)))

    def claim_shard(
        self, conn: Connection, shard: int, attempt: int, worker: str, token: str
    ) -> str | None:
        given = (worker, token, shard, attempt)
        model = conn.exec_driver_sql(_CLAIM.format("?"), given).scalar_one_or_none()
        if model is not None:
            note = f"INSERT INTO attempts ({_ATTEMPT_COLUMNS}) VALUES (?, ?, ?, ?, ?)"
            running = (shard, attempt, worker, str(AttemptState.RUNNING), self.now(conn))
            conn.exec_driver_sql(note, running)
        return None if model is None else str(model)

    def insert_results(self, conn: Connection, rows: Sequence[ResultTuple]) -> set[int]:
        # Nobody else writes between these two statements.
        ids = json.dumps([row[0] for row in rows])
        known = "SELECT id FROM results WHERE id IN (SELECT value FROM json_each(?))"
        old = {row[0] for row in conn.exec_driver_sql(known, (ids,))}
        new = [row for row in rows if row[0] not in old]
        if new:
            sql = f"INSERT INTO results ({_RESULT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            conn.exec_driver_sql(sql, new)
        return {row[0] for row in new}

    def is_transient(self, error: BaseException) -> bool:
        text = str(getattr(error, "orig", error))
        return "database is locked" in text or "database table is locked" in text


def _prepare_sqlite(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"page_size={_PAGE_BYTES}",  # heeded by a new file only
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "cache_size=-16384",  # KiB
        "journal_size_limit=67108864",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(conn: Connection) -> None:
    if conn.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        conn.exec_driver_sql("BEGIN IMMEDIATE")


class Postgres:
    """A server, through psycopg 3."""

    def __init__(self, url: URL) -> None:
        self._url = url

    def engine(self) -> Engine:
        # A plan that is kept from when the tables were small reads them whole when they are not.
        url = self._url
        if "options" not in url.query:
            url = url.update_query_dict({"options": _POSTGRES_OPTIONS})
        # No ping before each use, a round trip of its own: what fails on a connection that died
        # in the pool runs again on another (`Database`), and the pool drops all of its age.
        return create_engine(url, pool_size=5, max_overflow=20)

    def now(self, conn: Connection) -> float:
        sql = "SELECT extract(epoch FROM clock_timestamp())::float8"
        return float(conn.exec_driver_sql(sql).scalar_one())

    def clock(self) -> ColumnElement[float]:
        return _POSTGRES_CLOCK

    def insert_requests(self, conn: Connection, rows: Sequence[RequestTuple]) -> None:
        types = ["int8", "int8", "int4", "int4", "text", "text", "bytea"]
        _copy(conn, f"requests ({_REQUEST_COLUMNS})", types, rows)

    def insert_holds(self, conn: Connection, requests: Sequence[int], worker: str) -> None:
        sql = (
            "INSERT INTO holds (id, worker_id, taken_at) SELECT unnest(%s::int8[]), %s,"
            " extract(epoch FROM clock_timestamp())"
        )
        conn.exec_driver_sql(sql, (list(requests), worker))

    def claim_shard(
        self, conn: Connection, shard: int, attempt: int, worker: str, token: str
    ) -> str | None:
        sql = (
            f"WITH claimed AS ({_CLAIM.format('%s')}), noted AS"
            f" (INSERT INTO attempts ({_ATTEMPT_COLUMNS})"
            " SELECT %s, %s, %s, %s, extract(epoch FROM clock_timestamp()) FROM claimed)"
            " SELECT model FROM claimed"
        )
        running = (shard, attempt, worker, str(AttemptState.RUNNING))
        given = (worker, token, shard, attempt, *running)
        model = conn.exec_driver_sql(sql, given).scalar_one_or_none()
        return None if model is None else str(model)

    def insert_results(self, conn: Connection, rows: Sequence[ResultTuple]) -> set[int]:
        # Nobody else writes rows of these shards: the caller holds their locks. (Were it not so,
        # the key is unique, and the transaction would run again.)
        ids = [row[0] for row in rows]
        known = conn.exec_driver_sql("SELECT id FROM results WHERE id = ANY (%s)", (ids,))
        old = {row[0] for row in known}
        new = [row for row in rows if row[0] not in old]
        if new:
            types = ["int8", "text", "int4", "int4", "int4", "text", "float8", "text", "bytea"]
            _copy(conn, f"results ({_RESULT_COLUMNS})", types, new)
        return {row[0] for row in new}

    def is_transient(self, error: BaseException) -> bool:
        if getattr(error, "connection_invalidated", False):
            return True
        cause = getattr(error, "orig", error)
        state = getattr(cause, "sqlstate", None)
        if state is None:  # no server to talk to, or no longer
            return type(cause).__name__ in ("OperationalError", "InterfaceError")
        return state in _TRANSIENT_STATES or state.startswith("08")


def _copy(conn: Connection, into: str, types: list[str], rows: Sequence[Sequence[Any]]) -> None:
    driver: Any = conn.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


_POSTGRES_CLOCK: ColumnElement[float] = literal_column(
    "extract(epoch FROM clock_timestamp())::float8", Float()
)
_FROZEN_S = 5
"""A process that is stopped amid a transaction (SIGSTOP, a frozen machine) loses its locks after
this, so that others can declare it dead and go on; when it wakes the transaction runs again."""
_POSTGRES_OPTIONS = (
    "-c plan_cache_mode=force_custom_plan"
    f" -c idle_in_transaction_session_timeout={_FROZEN_S * 1000}"
)
_TRANSIENT_STATES = frozenset(
    {
        "25P03",  # idle_in_transaction_session_timeout
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "53300",  # too_many_connections
        "23505",  # unique_violation: two at once made the same row; the second now sees it
    }
)
