"""Celery's events about tasks, published a few times a second instead of one by one.

A shard makes three (received, started, succeeded). Celery publishes what there is in the next turn
of its loop, and that was an eighth of a busy prefill worker's time. Flower learns it up to
`LINGER_S` later.
"""

from __future__ import annotations

from typing import Any, Final

from celery import bootsteps
from kombu import common

LINGER_S: Final = 0.2
MOST_AT_ONCE: Final = 256
_ignore_errors: Any = common.ignore_errors


class Events(bootsteps.StartStopStep):  # type: ignore[misc]
    """A part of the consumer; starts and stops with its connection."""

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Let events wait for others from now on."""
        dispatcher = consumer.event_dispatcher
        if dispatcher is None or dispatcher.on_send_buffered is None:
            return  # it has no loop, and waits for nothing
        dispatcher.buffer_limit = MOST_AT_ONCE
        dispatcher.on_send_buffered = lambda: self._soon(consumer)

    def stop(self, consumer: Any) -> None:
        """Publish what waits. Where Redis is away the dispatcher keeps it for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            _ignore_errors(consumer, consumer.event_dispatcher.flush)

    def _soon(self, consumer: Any) -> None:
        if self._timer is None:
            self._timer = consumer.timer.call_after(LINGER_S, self._flush, (consumer,))

    def _flush(self, consumer: Any) -> None:
        self._timer = None
        consumer.on_send_event_buffered()
