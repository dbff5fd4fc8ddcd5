"""States of jobs, shards and attempts, and the one table of legal moves for each.

The diagrams in `docs/architecture.md` are drawn from these tables; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pdbatch.errors import IllegalTransition


class JobState(StrEnum):
    """A user's batch, from the first line read to the last row written."""

    VALIDATING = "validating"
    """Lines are being read into the store; nothing runs yet."""
    IN_PROGRESS = "in_progress"
    """Shards are published, claimed and run."""
    CANCELLING = "cancelling"
    """No new work is started; requests without a row are given a `batch_cancelled` row."""
    COMPLETED = "completed"
    """Every request has its one terminal row (some of them may be errors)."""
    FAILED = "failed"
    """The input could not be taken in; nothing ran."""
    CANCELLED = "cancelled"
    """A user stopped it; the results that were ready are kept."""
    EXPIRED = "expired"
    """Its deadline passed; the results that were ready are kept."""


class ShardState(StrEnum):
    """The requests that travel in one message."""

    PENDING = "pending"
    """Waits in SQL for the feeder."""
    QUEUED = "queued"
    """The feeder has published, or is about to publish, a message for this attempt."""
    CLAIMED = "claimed"
    """One worker owns every request that has neither a row nor a hold."""
    HANDED_OFF = "handed_off"
    """Every request without a row is held by a decode worker."""
    DONE = "done"
    """Every request has its row."""


class AttemptState(StrEnum):
    """One try at one shard."""

    RUNNING = "running"
    """Claimed and not yet ended."""
    SUCCEEDED = "succeeded"
    """The shard was done, or wholly handed off and then done, in this attempt."""
    GIVEN_BACK = "given_back"
    """The worker drained and put the rest back; this is nobody's failure."""
    LOST = "lost"
    """The worker that owned requests of it was declared dead, or its engine died."""


class ResultStatus(StrEnum):
    """What a terminal row says."""

    SUCCEEDED = "succeeded"
    """The row holds a RequestOutput."""
    REJECTED = "rejected"
    """The request itself was wrong; the row holds a RequestError with status 400."""
    FAILED = "failed"
    """Every attempt failed, or it was cancelled or expired."""


JOB_MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.VALIDATING: frozenset(
        {JobState.IN_PROGRESS, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.IN_PROGRESS: frozenset({JobState.COMPLETED, JobState.CANCELLING, JobState.EXPIRED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.COMPLETED: frozenset({JobState.IN_PROGRESS}),  # retry of failed requests
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset({JobState.IN_PROGRESS}),  # retry
    JobState.EXPIRED: frozenset({JobState.IN_PROGRESS}),  # retry
}

SHARD_MOVES: Mapping[ShardState, frozenset[ShardState]] = {
    ShardState.PENDING: frozenset({ShardState.QUEUED, ShardState.DONE}),
    ShardState.QUEUED: frozenset({ShardState.CLAIMED, ShardState.PENDING, ShardState.DONE}),
    ShardState.CLAIMED: frozenset({ShardState.HANDED_OFF, ShardState.PENDING, ShardState.DONE}),
    ShardState.HANDED_OFF: frozenset({ShardState.PENDING, ShardState.DONE}),
    ShardState.DONE: frozenset({ShardState.PENDING}),  # retry of failed requests
}

TERMINAL_JOB_STATES = frozenset(
    {JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
)


def check_job_move(old: JobState, new: JobState) -> None:
    """Raises IllegalTransition unless a job may go from `old` to `new`."""
    if new not in JOB_MOVES[old]:
        raise IllegalTransition(f"a job cannot go from {old} to {new}")


def check_shard_move(old: ShardState, new: ShardState) -> None:
    """Raises IllegalTransition unless a shard may go from `old` to `new`."""
    if new not in SHARD_MOVES[old]:
        raise IllegalTransition(f"a shard cannot go from {old} to {new}")
