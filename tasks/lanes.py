"""Lanes of their own for messages that must not wait for a free place.

Celery stops taking messages once as many are unacknowledged as the worker has places. On one
channel a `generate` would so wait behind the shards of a huge job, and eight open `generate`s
would leave no place for the very shards that answer them. Therefore a worker's consumer takes
shards of ordinary priority only, and a channel each takes

    pdbatch.generate        up to `GENERATES`: they wait for rows and cost nothing meanwhile
    pdbatch.<model>.high    as many shards as the worker has places, beside those

How many places a worker has follows from how many sequences its engine runs at once, unless it was
told a number: then that was Celery's concurrency from the start.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from kombu import common

from pdbatch.local.processes import LEAST_SHARDS
from pdbatch.queues import GENERATE_QUEUE, PRIORITY_NAMES

GENERATES = 256
"""Most `generate` tasks that one worker has open."""
_ignore_errors: Any = common.ignore_errors


class Lanes(bootsteps.StartStopStep):  # type: ignore[misc]
    """A part of the consumer; starts and stops with its connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._lanes: list[Any] = []
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """Take the urgent queues out of the common consumer and listen to each on its own."""
        _give_places(consumer)
        on_message = consumer.create_task_handler()
        for name, places in _urgent(consumer):
            queue = consumer.app.amqp.queues[name]
            consumer.task_consumer.cancel_by_queue(name)
            channel = consumer.connection.channel()
            channel.basic_qos(0, places, False)
            lane = consumer.app.amqp.Consumer(
                channel,
                queues=[queue],
                accept=consumer.app.conf.accept_content,
                on_decode_error=consumer.on_decode_error,
            )
            lane.on_message = on_message
            self._lanes.append(lane)
            lane.consume()

    def stop(self, consumer: Any) -> None:
        """Take no more; the channels stay open for acknowledgements."""
        for lane in self._lanes:
            _ignore_errors(consumer, lane.cancel)
        if consumer.connection is None:  # lost: its channels are gone with it
            self._lanes.clear()

    def shutdown(self, consumer: Any) -> None:
        """The end."""
        self.stop(consumer)
        for lane in self._lanes:
            _ignore_errors(consumer, lane.channel.close)
        self._lanes.clear()


def _give_places(consumer: Any) -> None:
    """As many places as the engine needs, where Celery was told none."""
    if consumer.initial_prefetch_count != LEAST_SHARDS:
        return
    consumer.initial_prefetch_count = consumer.pool.num_shards
    consumer.qos.value = consumer.initial_prefetch_count
    consumer.qos.update()


def _urgent(consumer: Any) -> list[tuple[str, int]]:
    """(queue, most unacknowledged messages) of those that the worker was told to listen to."""
    places = consumer.initial_prefetch_count
    names = [queue.name for queue in consumer.task_consumer.queues]
    lanes = {name: places for name in names if name.endswith(f".{PRIORITY_NAMES[0]}")}
    if GENERATE_QUEUE in names:
        lanes[GENERATE_QUEUE] = GENERATES
    return list(lanes.items())
