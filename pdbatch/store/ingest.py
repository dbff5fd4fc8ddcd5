"""Taking the lines of a job in, in constant memory."""

from __future__ import annotations

import logging
import threading
from array import array
from types import TracebackType

import msgspec
from sqlalchemy import Connection, func, select

from pdbatch.errors import IllegalTransition, StoreError
from pdbatch.ids import JobId, request_key
from pdbatch.request import RequestError
from pdbatch.states import JobState, ResultStatus
from pdbatch.store import ledger
from pdbatch.store.chunk import Chunk, OpenShard, write_chunk
from pdbatch.store.database import Database
from pdbatch.store.idsets import is_in
from pdbatch.store.jobs import Jobs
from pdbatch.store.keys import MAX_INDEX, job_range, request_index_of, row_id
from pdbatch.store.models import JOBS, REQUESTS
from pdbatch.store.rows import IngestRow, storable

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 30.0
_ROWS_AT_ONCE = 5_000
_BYTES_AT_ONCE = 16 * 2**20
_OPEN_SHARDS = 1_024  # one for each model; above this many the oldest is closed early


class _EndpointOf(msgspec.Struct):
    """The one field of a RequestSpec that an output line needs."""

    endpoint: str = "/v1/completions"


_decode_endpoint = msgspec.json.Decoder(_EndpointOf).decode


class Ingest:
    """Context manager: `with store.ingest(...) as ingest: ingest.add(row)`.

    1. `add` gathers rows; every 5,000 rows (or 16 MiB) are written in one transaction, into
       shards of one model each. Rejects get their terminal row with them.
    2. Leaving the block without an error closes: the last rows are written, lines whose
       custom_id was used before are rejected (`duplicate_custom_id`), the job is activated.
    3. Leaving it by an exception fails the job with the exception's text.

    Within the block a thread tells the job every 30 s that somebody is there, however slowly
    the lines come; reconcilers fail a job whose submitter was killed.

    Raises IllegalTransition from `add` or `close` when the job was ended meanwhile.
    """

    def __init__(
        self, database: Database, jobs: Jobs, job: JobId, *, shard_size: int, default_model: str
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, not {shard_size}")
        self._db = database
        self._jobs = jobs
        self.job = job
        self.num_rows = 0
        """Rows added so far."""
        self._shard_size = shard_size
        self._default_model = default_model
        query = select(JOBS.c.no, JOBS.c.model, JOBS.c.endpoint)
        database.read(lambda conn: database.job_no(conn, job))
        row = database.read(lambda conn: conn.execute(query.where(JOBS.c.id == job)).one())
        self._no, self._model, self._endpoint = row
        self._num_shards = 0
        self._open: dict[str, OpenShard] = {}
        self._chunk = Chunk()
        self._closed = False
        self._left = threading.Event()

    def add(self, row: IngestRow) -> None:
        """The next line; indexes rise by one, from 0."""
        if row.index != self.num_rows or row.index > MAX_INDEX:
            raise ValueError(f"the next row has index {self.num_rows}, not {row.index}")
        if (row.body is None) == (row.reject is None):
            raise ValueError("a row has either a body or a reject")
        shard = self._shard_for(self._model or row.model or self._default_model)
        shard.num_requests += 1
        line = row.index + 1 if row.line is None else row.line
        endpoint = row.endpoint or self._endpoint_of(row.body)
        id_ = row_id(self._no, row.index)
        self._chunk.add((id_, shard.id, line, 0, endpoint, storable(row.custom_id), row.body))
        if row.reject is not None:
            shard.num_rejected += 1
            key = request_key(self.job, row.index)
            self._chunk.rejects.append(
                ledger.error_row(id_, shard.id, key, row.reject, ResultStatus.REJECTED)
            )
        self._chunk.shards[shard.id] = shard
        if shard.num_requests >= self._shard_size:
            del self._open[shard.model]
        self.num_rows += 1
        if len(self._chunk.requests) >= _ROWS_AT_ONCE or self._chunk.num_bytes >= _BYTES_AT_ONCE:
            self._flush()

    def _shard_for(self, model: str) -> OpenShard:
        shard = self._open.get(model)
        if shard is None:
            if len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            shard = OpenShard(row_id(self._no, self._num_shards), model)
            self._open[model] = shard
            self._num_shards += 1
        return shard

    def _endpoint_of(self, body: bytes | None) -> str:
        if body is None:
            return self._endpoint or "/v1/completions"
        return _decode_endpoint(body).endpoint

    def _flush(self) -> None:
        chunk, self._chunk = self._chunk, Chunk()
        if chunk.requests:
            self._db.write(lambda conn: write_chunk(self._db, conn, self._no, chunk))

    def close(self) -> None:
        """Writes what is left, rejects duplicates, activates the job. Once only."""
        if self._closed:
            return
        self._flush()
        self._reject_duplicates()
        state = self._jobs.activate(self.job)
        self._closed = True
        if state not in (JobState.IN_PROGRESS, JobState.COMPLETED):
            raise IllegalTransition(f"job {self.job} was {state} while it was taken in")

    def _reject_duplicates(self) -> None:
        again = self._db.read(self._used_before)
        for start in range(0, len(again), _ROWS_AT_ONCE):
            ids = again[start : start + _ROWS_AT_ONCE].tolist()
            self._db.write(lambda conn, ids=ids: self._reject(conn, ids))  # type: ignore[misc]

    def _used_before(self, conn: Connection) -> array[int]:
        """Requests whose custom_id an earlier line has; 8 bytes each."""
        mine = REQUESTS.c.id.between(*job_range(self._no)), REQUESTS.c.custom_id.is_not(None)
        nth = func.row_number().over(partition_by=REQUESTS.c.custom_id, order_by=REQUESTS.c.id)
        counted = select(REQUESTS.c.id, nth.label("nth")).where(*mine).subquery()
        query = select(counted.c.id).where(counted.c.nth > 1).order_by(counted.c.id)
        return array("q", conn.execute(query).scalars())

    def _reject(self, conn: Connection, ids: list[int]) -> None:
        query = select(REQUESTS).where(is_in(REQUESTS.c.id, ids))
        rows = []
        for row in conn.execute(query.order_by(REQUESTS.c.id)):
            error = RequestError(
                code="duplicate_custom_id",
                message=f"custom_id {row.custom_id!r:.200} was used by an earlier line; "
                "give each line its own.",
                param="custom_id",
                line=row.line,
                status=400,
            )
            key = request_key(self.job, request_index_of(row.id))
            reject = ledger.error_row(row.id, row.shard_id, key, error, ResultStatus.REJECTED)
            rows.append(reject)
        ledger.write_rows(self._db, conn, rows)

    def __enter__(self) -> Ingest:
        threading.Thread(target=self._stay, name="pdbatch-ingest", daemon=True).start()
        return self

    def _stay(self) -> None:
        while not self._left.wait(_HEARTBEAT_S):
            try:
                self._jobs.hear(self.job)
            except StoreError as error:
                logger.warning("%s: no sign of life could be left: %s", self.job, error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._leave(error)
        finally:
            self._left.set()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.close()
            return
        if isinstance(error, IllegalTransition):
            return  # somebody else ended the job
        try:
            self._jobs.fail(self.job, f"{type(error).__name__}: {error}")
        except StoreError as second:
            error.add_note(f"the job could not be marked as failed: {second}")
