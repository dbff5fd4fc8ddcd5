"""Shards: claimed, handed off, given back. (Published: `pdbatch.store.feeding`.)"""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, bindparam, select, update

from pdbatch.ids import JobId, ShardIndex, WorkerId
from pdbatch.states import AttemptState, JobState, ShardState, check_shard_move
from pdbatch.store import feeding, ledger, locks
from pdbatch.store.database import Database
from pdbatch.store.jobs import ending_error
from pdbatch.store.keys import request_index_of, row_id
from pdbatch.store.locks import ShardRow
from pdbatch.store.models import REQUESTS, SHARDS
from pdbatch.store.rows import ClaimedRequest, ClaimedShard, QueueDepth, ShardMessage


class Shards:
    """`store.shards`. The feeder calls the first four, workers the rest."""

    def __init__(self, database: Database, *, max_attempts: int) -> None:
        self._db = database
        self._max_attempts = max_attempts

    def pending_queues(self) -> list[QueueDepth]:
        """(model, priority, PENDING shards) of all jobs in progress, by priority."""
        return self._db.read(feeding.pending_queues)

    def queued_queues(self, queued_before: float) -> list[QueueDepth]:
        """(model, priority, QUEUED shards) published before that time and never claimed:
        the queues worth a look whether Redis still has their messages."""
        return self._db.read(lambda conn: feeding.queued_queues(conn, queued_before))

    def take_for_publish(
        self, model: str, priority: int, limit: int, now: float | None = None
    ) -> list[ShardMessage]:
        """PENDING to QUEUED for at most `limit` shards of one queue; publish these messages.

        Goes round the jobs in progress by weight: each next place goes to the job with the fewest
        shards queued or claimed for its weight, so a small new job is served at once.
        `now`: the time to note as published; None is the database's clock. Several feeders
        never take the same shard.
        """
        db = self._db
        return db.write(lambda conn: feeding.take(db, conn, model, priority, limit, now))

    def requeue(self, queued_before: float, model: str, priority: int) -> int:
        """QUEUED back to PENDING, same attempt, for shards of this queue published before that
        time: their messages are gone. A message that is not does no harm. Returns how many."""
        db = self._db
        return db.write(lambda conn: feeding.requeue(db, conn, queued_before, model, priority))

    def claim(
        self, worker: WorkerId, job: JobId, shard: ShardIndex | int, attempt: int
    ) -> ClaimedShard | None:
        """QUEUED to CLAIMED. None (acknowledge and forget the message) where the attempt is stale,
        the shard is not QUEUED, the job is over, the worker is not live, or nothing is left
        to run: where all that is left is held by live workers the shard is HANDED_OFF."""
        token = secrets.token_hex(8)

        def run(conn: Connection) -> ClaimedShard | None:
            no = self._db.job_no(conn, job)
            priority = locks.priority_for(conn, worker, no)
            if priority is None:
                return None
            id_ = row_id(no, shard)
            model = self._note_claim(conn, id_, attempt, worker, token)
            if model is None:
                return None
            requests = self._left_to_run(conn, id_)
            if not requests:
                self._hand_over(conn, id_, attempt, worker)
                return None
            return ClaimedShard(job, ShardIndex(shard), attempt, model, priority, requests)

        return self._db.write(run)

    def _find(self, conn: Connection, job_no: int, shard: int) -> ShardRow | None:
        id_ = row_id(job_no, shard)
        return locks.lock_shards(conn, [id_]).get(id_)

    def _note_claim(
        self, conn: Connection, shard: int, attempt: int, worker: WorkerId, token: str
    ) -> str | None:
        """QUEUED to CLAIMED; the shard's model, or None where the claim is refused."""
        model = self._db.dialect.claim_shard(conn, shard, attempt, worker, token)
        if model is not None:
            return model
        found = locks.lock_shards(conn, [shard]).get(shard)
        if found is None or found.attempt != attempt or found.state is not ShardState.CLAIMED:
            return None
        # With our token: an earlier try was committed, and its answer lost.
        return found.model if found.claim_token == token else None

    def _left_to_run(self, conn: Connection, shard_id: int) -> list[ClaimedRequest]:
        rows = conn.execute(_LEFT_TO_RUN, {"shard": shard_id}).all()
        return [ClaimedRequest(request_index_of(id_), body, tries) for id_, body, tries in rows]

    def _hand_over(self, conn: Connection, shard: int, attempt: int, worker: WorkerId) -> bool:
        """CLAIMED to HANDED_OFF, and its lock; False where `worker` has not claimed it so."""
        check_shard_move(ShardState.CLAIMED, ShardState.HANDED_OFF)
        given = {"shard": shard, "tried": attempt, "worker": worker}
        return conn.execute(_HAND_OVER, given).rowcount == 1

    def hand_off(self, worker: WorkerId, job: JobId, shard: ShardIndex | int, attempt: int) -> bool:
        """The claimer is through with the shard: each request has left it.

        True: all that has no row is held by live workers (HANDED_OFF), or DONE. False: the
        claim was over already, or some requests were dropped by their holder since, and the shard
        is PENDING again for those. In every case the claimer owns nothing of it any more."""

        def run(conn: Connection) -> bool:
            no = self._db.job_no(conn, job)
            id_ = row_id(no, shard)
            mine = self._hand_over(conn, id_, attempt, worker)
            # Locked by now: what has an owner here has one when this is committed.
            if mine and not locks.unheld_requests(conn, [id_]):
                return True
            found = self._find(conn, no, shard)
            if found is None or found.attempt != attempt:
                return False
            if mine:
                ledger.put_back(self._db, conn, [found], AttemptState.GIVEN_BACK)
                return False
            return found.state in (ShardState.HANDED_OFF, ShardState.DONE)

        return self._db.write(run)

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

        def run(conn: Connection) -> bool:
            no = self._db.job_no(conn, job)
            found = self._find(conn, no, shard)
            if found is None or found.attempt != attempt or found.claimed_by != worker:
                return False
            if failed:
                lost = locks.unheld_requests(conn, [found.id])
                ledger.count_loss(self._db, conn, lost, self._max_attempts)
                found = self._find(conn, no, shard)
            if found is not None and found.state is ShardState.CLAIMED:
                ended_as = AttemptState.LOST if failed else AttemptState.GIVEN_BACK
                ledger.put_back(self._db, conn, [found], ended_as)
            return True

        return self._db.write(run)

    def cancel(self, job: JobId, shard: ShardIndex | int) -> int:
        """Gives what has no row a `batch_cancelled` row; the shard is DONE. Returns how many."""

        def run(conn: Connection) -> int:
            found = self._find(conn, self._db.job_no(conn, job), shard)
            if found is None or found.state is ShardState.DONE:
                return 0
            error = ending_error(JobState.CANCELLED)
            return ledger.end_requests(self._db, conn, REQUESTS.c.shard_id == found.id, error)

        return self._db.write(run)


_HAND_OVER = (
    update(SHARDS)
    .where(
        SHARDS.c.id == bindparam("shard"),
        SHARDS.c.attempt == bindparam("tried"),
        SHARDS.c.claimed_by == bindparam("worker"),
        SHARDS.c.state == ShardState.CLAIMED,
    )
    .values(state=str(ShardState.HANDED_OFF), claimed_by=None)
)
_LEFT_TO_RUN = (
    select(REQUESTS.c.id, REQUESTS.c.body, REQUESTS.c.num_retries)
    .where(REQUESTS.c.shard_id == bindparam("shard"), locks.without_row(), locks.without_holder())
    .order_by(REQUESTS.c.id)
)
