"""Shards: published, claimed, handed off, given back."""

from __future__ import annotations

from pdbatch.ids import JobId, ShardIndex, WorkerId
from pdbatch.store.database import Database
from pdbatch.store.rows import ClaimedShard, QueueDepth, ShardMessage


class Shards:
    """`store.shards`. The feeder calls the first four, workers the rest."""

    def __init__(self, database: Database, *, max_attempts: int) -> None:
        self._db = database
        self._max_attempts = max_attempts

    def pending_queues(self) -> list[QueueDepth]:
        """(model, priority, PENDING shards) of all jobs in progress, by priority."""
        raise NotImplementedError

    def queued_queues(self, queued_before: float) -> list[QueueDepth]:
        """(model, priority, QUEUED shards) published before that time and never claimed:
        the queues worth a look whether Redis still has their messages."""
        raise NotImplementedError

    def take_for_publish(
        self, model: str, priority: int, limit: int, now: float | None = None
    ) -> list[ShardMessage]:
        """PENDING to QUEUED for at most `limit` shards of one queue; publish these messages.

        Goes round the jobs in progress by weight: each next place goes to the job with the fewest
        shards queued or claimed for its weight, so a small new job is served at once.
        `now`: the time to note as published; None is the database's clock. Several feeders
        never take the same shard.
        """
        raise NotImplementedError

    def requeue(self, queued_before: float, model: str, priority: int) -> int:
        """QUEUED back to PENDING, same attempt, for shards of this queue published before that
        time: their messages are gone. A message that is not does no harm. Returns how many."""
        raise NotImplementedError

    def claim(
        self, worker: WorkerId, job: JobId, shard: ShardIndex | int, attempt: int
    ) -> ClaimedShard | None:
        """QUEUED to CLAIMED. None (acknowledge and forget the message) where the attempt is stale,
        the shard is not QUEUED, the job is over, the worker is not live, or nothing is left
        to run: where all that is left is held by live workers the shard is HANDED_OFF."""
        raise NotImplementedError

    def hand_off(self, worker: WorkerId, job: JobId, shard: ShardIndex | int, attempt: int) -> bool:
        """The claimer is through with the shard: each request has left it.

        True: all that has no row is held by live workers (HANDED_OFF), or DONE. False: the
        claim was over already, or some requests were dropped by their holder since, and the shard
        is PENDING again for those. In every case the claimer owns nothing of it any more."""
        raise NotImplementedError

    def give_back(
        self,
        worker: WorkerId,
        job: JobId,
        shard: ShardIndex | int,
        attempt: int,
        failed: bool = False,
    ) -> bool:
        """CLAIMED to PENDING with the next attempt. `failed`: counts against its requests (an
        engine died); those that were lost too often get `batch_failed` rows. A draining worker
        gives back without. False: the claim was over already."""
        raise NotImplementedError

    def cancel(self, job: JobId, shard: ShardIndex | int) -> int:
        """Gives what has no row a `batch_cancelled` row; the shard is DONE. Returns how many."""
        raise NotImplementedError
