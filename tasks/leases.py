"""Messages in work are kept; those of a worker that is gone come back within a minute.

Celery on Redis gives back what was taken and not acknowledged for `visibility_timeout`, whether its
worker lives or not: a short one runs long tasks twice, a long one leaves a dead worker's `generate`
unanswered for an hour. So the timeout is short (`VISIBILITY_S`) and a living worker renews what it
works on. An acknowledgement that failed because Redis was away is made up for here as well.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Final

from celery import bootsteps
from celery.worker import state

logger = logging.getLogger(__name__)

VISIBILITY_S: Final = 60
RENEW_EVERY_S: Final = 15.0

owed: deque[str] = deque(maxlen=10_000)
"""Delivery tags whose acknowledgement failed."""


class Leases(bootsteps.StartStopStep):  # type: ignore[misc]
    """A part of the consumer; starts and stops with its connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Renew from now on."""
        channel = consumer.connection.default_channel
        self._timer = consumer.timer.call_repeatedly(RENEW_EVERY_S, renew, (channel,))

    def stop(self, consumer: Any) -> None:
        """Renew no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def renew(channel: Any) -> None:
    """One round. Whatever Redis says is logged: the consumer notices an outage by itself."""
    in_work = [request.message.delivery_tag for request in list(state.requests.values())]
    done = [owed.popleft() for _ in range(len(owed))]
    try:
        with channel.conn_or_acquire() as client, client.pipeline() as pipe:
            if in_work:
                now = time.time()
                pipe.zadd(channel.unacked_index_key, dict.fromkeys(in_work, now), xx=True)
            if done:
                pipe.zrem(channel.unacked_index_key, *done)
                pipe.hdel(channel.unacked_key, *done)
            pipe.execute()
    except Exception as error:
        owed.extend(done)
        logger.info("messages were not renewed: %s: %s", type(error).__name__, error)
