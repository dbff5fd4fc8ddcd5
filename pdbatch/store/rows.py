"""What goes into the store and what comes out of it: plain frozen values, no SQL.

A request is named by its `Key`, (job, index). All times are seconds since the epoch
by the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import msgspec

from pdbatch.ids import JobId, RequestIndex, ShardIndex, WorkerId, split_key
from pdbatch.request import RequestError, RequestOutput, StageTimes
from pdbatch.states import JobState, ResultStatus

_encode_json = msgspec.json.Encoder().encode


@overload
def storable(text: str) -> str: ...
@overload
def storable(text: None) -> None: ...
@overload
def storable(text: str | None) -> str | None: ...
def storable(text: str | None) -> str | None:
    """`text` as both databases can hold it: NULs and lone surrogates become U+FFFD."""
    if text is None or (text.isascii() and "\x00" not in text):
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").replace("\x00", "�")


Key = tuple[JobId, RequestIndex]
"""One request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as the user asks for it."""

    model: str | None = None
    """Serves the whole job; None: each line's own model decides."""
    priority: int = 0
    """Smaller runs first; each priority has its own queue."""
    weight: int = 1
    """Share of the queue beside other jobs of the same priority; 1 or more."""
    input_name: str = ""
    """What the user called the input, for people to read."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    endpoint: str | None = None
    deadline_at: float | None = None
    """What has no row by then gets a `batch_expired` row."""

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise ValueError(f"weight must be at least 1, not {self.weight}")


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests of a job."""

    total: int = 0
    succeeded: int = 0
    rejected: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """Those that have their terminal row."""
        return self.succeeded + self.rejected + self.failed


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a job's succeeded requests."""

    prompt: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as it stands now."""

    id: JobId
    state: JobState
    model: str | None
    endpoint: str | None
    priority: int
    weight: int
    input_name: str
    metadata: Mapping[str, str]
    error: str | None
    """Why a FAILED job failed."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    deadline_at: float | None
    counts: Counts
    tokens: TokenCounts
    times: StageTimes
    """Sums over the requests that have rows."""
    transfer_bytes: int = 0
    """KV that was handed over for them."""


class IngestRow(msgspec.Struct, frozen=True):
    """One line of input: a request (`body`) or a reject, never both, never neither."""

    index: RequestIndex | int
    """0-based, rising by one from row to row."""
    custom_id: str | None
    model: str | None
    """The line's own model; the job's model goes before it."""
    body: bytes | None
    """JSON of a RequestSpec."""
    reject: RequestError | None = None
    line: int | None = None
    """1-based line of the file; None: index + 1."""
    endpoint: str | None = None
    """None: taken from the body, or the job's for a reject."""


class ShardMessage(NamedTuple):
    """What a queue message says, and all it says."""

    job: JobId
    shard: ShardIndex
    attempt: int


class QueueDepth(NamedTuple):
    """Shards that belong into one queue."""

    model: str
    priority: int
    num_shards: int


class ClaimedRequest(NamedTuple):
    """A request that the claimer now answers for."""

    index: RequestIndex  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    body: bytes
    """JSON of a RequestSpec."""
    num_retries: int
    """How often an owner of it was lost."""


@dataclass(frozen=True, slots=True)
class ClaimedShard:
    """The right to run these, until the shard's rows are complete, or it is handed off,
    given back, or its worker is declared dead."""

    job: JobId
    shard: ShardIndex
    attempt: int
    model: str
    priority: int
    requests: list[ClaimedRequest]
    """At least one, in index order; those with a row or a live holder are left out."""


@dataclass(frozen=True, slots=True)
class ResultRow:
    """The terminal row of one request, to be written."""

    job: JobId
    index: RequestIndex
    status: ResultStatus
    body: bytes
    """JSON of a RequestOutput."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    """Of the first output; None for an error."""
    times: StageTimes = field(default_factory=StageTimes)
    """Added to the sums of its shard."""
    transfer_bytes: int = 0
    """Likewise."""

    @classmethod
    def from_output(cls, output: RequestOutput) -> ResultRow:
        """The row of `output`. Its status follows from the error: none is SUCCEEDED, one
        with an HTTP status of 4xx is REJECTED, any other is FAILED."""
        job, index = split_key(output.key)
        usage = output.usage
        return cls(
            job=job,
            index=index,
            status=_status_of(output.error),
            body=_encode_json(output),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            finish_reason=output.outputs[0].finish_reason if output.outputs else None,
            times=output.times,
            transfer_bytes=output.transfer.num_bytes if output.transfer else 0,
        )


def _status_of(error: RequestError | None) -> ResultStatus:
    if error is None:
        return ResultStatus.SUCCEEDED
    if error.status is not None and 400 <= error.status < 500:
        return ResultStatus.REJECTED
    return ResultStatus.FAILED


class StoredResult(msgspec.Struct, frozen=True):
    """A terminal row as it is read, with what an output line needs beside it."""

    job: JobId
    index: RequestIndex
    custom_id: str | None
    endpoint: str
    model: str
    status: ResultStatus
    body: bytes
    """JSON of a RequestOutput."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str | None
    finished_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One life of one worker."""

    id: WorkerId
    name: str
    host: str
    epoch: int
    role: str
    model: str
    device: str
    state: str
    """`live`, `retired` or `dead`."""
    info: Mapping[str, Any]
    stats: Mapping[str, Any]
    """As in its last heartbeat."""
    registered_at: float
    heartbeat_at: float
    ended_at: float | None
    num_shards: int
    """Claimed now."""
    num_holds: int
    """Requests held now."""
