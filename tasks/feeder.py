"""Shards from the store into the queues, as fast as workers take them and no faster.

A queue is first come, first served; the fair order is made when shards are taken from the store.
So a queue is kept as short as its workers allow, and a small job behind a huge one soon has its
turn. Each queue has a depth of its own, from `LEAST_DEPTH` to `queue_high`:

    found empty while shards wait     the depth doubles, and the next look comes soon
    found more than half full         the depth shrinks by a quarter
    found below three quarters of it,
    or below `queue_low`              filled up to the depth

Any number of feeders may run: the store gives each shard to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from redis import Redis

from pdbatch.config import Settings
from pdbatch.queues import queue_name
from pdbatch.store import QueueDepth, Store
from tasks.queue import Publisher, lengths

LEAST_DEPTH = 2
_REMEMBERED_QUEUES = 10_000


@dataclass(slots=True)
class _Queue:
    """What is known of one queue between two looks."""

    depth: int
    num_pending: int = 0


class Feeder:
    """`survey` now and then, `refill` in between while it says so. Not for several threads."""

    def __init__(
        self, store: Store, client: Redis, publisher: Publisher, settings: Settings
    ) -> None:
        self._store = store
        self._client = client
        self._publisher = publisher
        self._low = settings.queue_low
        self._high = settings.queue_high
        self._queues: dict[tuple[str, int], _Queue] = {}
        self._hungry: list[QueueDepth] = []

    def survey(self, *, may_shrink: bool = True) -> bool:
        """Look at every queue with shards that wait, and fill those that need it. True: call
        `refill` soon. Raises StoreError, and what Redis raises."""
        pending = self._store.shards.pending_queues()
        if len(self._queues) > _REMEMBERED_QUEUES:
            self._queues.clear()
        for model, priority, num_shards in pending:
            queue = self._queues.setdefault((model, priority), _Queue(min(LEAST_DEPTH, self._high)))
            queue.num_pending = num_shards
        return self._fill(pending, may_shrink=may_shrink)

    def refill(self) -> bool:
        """Look again at the queues that were found empty. As `survey`."""
        return self._fill(self._hungry, may_shrink=False)

    def _fill(self, queues: list[QueueDepth], *, may_shrink: bool) -> bool:
        self._hungry, now = [], None
        for known, length in zip(queues, lengths(self._client, queues), strict=True):
            queue = self._queues[known.model, known.priority]
            self._adapt(queue, length, may_shrink=may_shrink)
            if length and length >= self._threshold(queue):
                continue
            now = self._store.now() if now is None else now
            queue.num_pending -= self._publish(known, queue.depth - length, now)
            if not length and queue.num_pending > 0:
                self._hungry.append(known)
        return bool(self._hungry)

    def _adapt(self, queue: _Queue, length: int, *, may_shrink: bool) -> None:
        if not length:
            queue.depth = min(2 * queue.depth, self._high)
        elif may_shrink and length > queue.depth // 2:
            queue.depth = max(min(LEAST_DEPTH, self._high), queue.depth - queue.depth // 4)

    def _threshold(self, queue: _Queue) -> int:
        return min(queue.depth, max(self._low, queue.depth - queue.depth // 4))

    def _publish(self, known: QueueDepth, limit: int, now: float) -> int:
        """Takes up to `limit` shards of a queue and sends their messages; returns how many."""
        taken = self._store.shards.take_for_publish(known.model, known.priority, limit, now)
        if taken:
            self._publisher.publish(queue_name(known.model, known.priority), taken, now)
        return len(taken) if len(taken) == limit else known.num_shards
