"""What sees to it that nothing waits for somebody who is gone.

- Workers without a sign of life: declared dead, their work goes back to the queue.
- Jobs past their deadline, or whose cancelling was interrupted: ended. So are those whose
  submitter was killed before all lines were in.
- Shards that were published and whose message is no more (Redis was emptied, a worker died
  between taking and claiming, a publish failed): published again.

Any number of reconcilers may run. Every step is a transaction that looks again before it acts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from redis import Redis

from pdbatch.config import Settings
from pdbatch.store import Store
from tasks.queue import oldest

logger = logging.getLogger(__name__)

_SUBMITTER_TTL_S = 300.0
"""Ten of its heartbeats."""
_WORKERS_KEPT_S = 7 * 86400.0
"""After their end, for who asks what became of them; each start of a worker is a row."""
_FORGET_EVERY_S = 3600.0


class Reconciler:
    """`sweep` needs the database alone, `requeue` Redis too. Not for several threads."""

    def __init__(
        self,
        store: Store,
        client: Redis,
        settings: Settings,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._client = client
        self._settings = settings
        self._clock_s = clock_s
        self._seen_at_s = clock_s()
        self._patient_until_s = 0.0
        self._forget_at_s = self._seen_at_s

    def sweep(self) -> int:
        """Bury dead workers, end jobs that are due. Returns how many of both. Raises StoreError.

        Now and then rows of workers that ended a week ago are removed, too.

        After a time without the database (it was away, or this process or machine slept)
        workers get two heartbeats to speak up first: they may have been as deaf as we were.
        """
        dead = []
        patient = self._must_be_patient()
        if not patient:
            dead = self._store.workers.reap(self._settings.worker_ttl_s)
        for worker in dead:
            logger.warning("%s is dead; its work goes back to the queue", worker)
        ended = self._store.jobs.sweep(None if patient else _SUBMITTER_TTL_S)
        for job in ended:
            logger.info("%s has ended", job)
        self._seen_at_s = self._clock_s()
        if self._seen_at_s >= self._forget_at_s:
            self._store.workers.forget(_WORKERS_KEPT_S)
            self._forget_at_s = self._seen_at_s + _FORGET_EVERY_S
        return len(dead) + len(ended)

    def _must_be_patient(self) -> bool:
        self._store.now()  # waits while the database is away; raises when that lasts
        now_s = self._clock_s()
        if now_s - self._seen_at_s > self._settings.worker_ttl_s / 2:
            self._patient_until_s = now_s + 2 * self._settings.heartbeat_s
        self._seen_at_s = now_s
        return now_s < self._patient_until_s

    def requeue(self) -> int:
        """Shards whose message is lost wait for the feeder again. Returns how many.

        A queue is first in, first out: a shard that was published well before the oldest message
        of its queue, or well before now where the queue is empty, and was not claimed, has no
        message any more. (If a worker is just about to claim it, the second message does no harm.)
        Raises StoreError, and what Redis raises.
        """
        slack_s = self._settings.requeue_after_s
        now = self._store.now()
        suspects = self._store.shards.queued_queues(now - slack_s)
        num_lost = 0
        for queue, oldest_at in zip(suspects, oldest(self._client, suspects), strict=True):
            before = (now if oldest_at is None else min(oldest_at, now)) - slack_s
            lost = self._store.shards.requeue(before, queue.model, queue.priority)
            if lost:
                logger.warning("%d shards of %s lost their messages", lost, queue.model)
            num_lost += lost
        return num_lost
