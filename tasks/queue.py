"""The queues in Redis, as the feeder and the reconciler see them: lengths, oldest messages, and
publishing many messages at once.

A queue is one list (`priority_steps` is `[0]`): messages are pushed on its left and popped from
its right, so the last is the oldest. Each message carries the time at which the store noted it as
published (`queued_at`, by the database's clock) in its headers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from celery import Celery
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pdbatch.queues import PREFILL_TASK, connect, queue_name
from pdbatch.store import QueueDepth, ShardMessage

_QUEUED_AT: Final = "queued_at"
_TIMEOUT_S = 1.5
"""Nothing here waits in Redis, so an answer that takes longer will not come."""
_AT_ONCE = 500


def open_client(url: str) -> Redis:
    """A client that answers or fails soon: whoever uses it tries again in its own time."""
    client = connect(url, timeout_s=_TIMEOUT_S)
    client.set_retry(Retry(NoBackoff(), 0))
    return client


def task_id(message: ShardMessage) -> str:
    """The Celery id of a shard's message: the same when it is published again."""
    return f"{message.job}:{message.shard}:{message.attempt}"


def names(queues: Sequence[QueueDepth]) -> list[str]:
    """The lists of these queues."""
    return [queue_name(queue.model, queue.priority) for queue in queues]


def lengths(client: Redis, queues: Sequence[QueueDepth]) -> list[int]:
    """How many messages each holds. One round trip. Raises redis.RedisError."""
    if not queues:
        return []
    pipeline = client.pipeline(transaction=False)
    for name in names(queues):
        pipeline.llen(name)
    return [int(length) for length in pipeline.execute()]


def oldest(client: Redis, queues: Sequence[QueueDepth]) -> list[float | None]:
    """When the oldest message of each was published; None for an empty queue. A message of
    unknown age counts as old as can be. One round trip. Raises redis.RedisError."""
    if not queues:
        return []
    pipeline = client.pipeline(transaction=False)
    for name in names(queues):
        pipeline.lindex(name, -1)
    return [_queued_at(message) for message in pipeline.execute()]


def _queued_at(message: bytes | None) -> float | None:
    if message is None:
        return None
    try:
        return float(json.loads(message)["headers"][_QUEUED_AT])
    except (ValueError, TypeError, KeyError):
        return 0.0


class Publisher:
    """Sends shards' messages over one connection of its own, which it opens when needed.

    Not for several threads. A publish that fails leaves some of its messages sent, and
    nobody knows which: the reconciler publishes those again that nobody claims.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._producer: Any = None

    def publish(self, queue: str, messages: Sequence[ShardMessage], queued_at: float) -> None:
        """All messages, by 500 in one round trip. Raises what Redis or kombu raises, and
        connects anew at the next call."""
        try:
            producer = self._open()
            with producer.batch(_AT_ONCE):
                for message in messages:
                    self._send(producer, queue, message, queued_at)
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        if self._producer is None:
            options = self._app.conf.broker_transport_options
            self._connection = self._app.connection_for_write(
                transport_options={**options, "socket_timeout": _TIMEOUT_S}
            )
            channel = self._connection.channel()  # one try; the default channel tries for ever
            self._producer = self._app.amqp.Producer(channel, auto_declare=False)
        return self._producer

    def _send(self, producer: Any, queue: str, message: ShardMessage, queued_at: float) -> None:
        amqp = self._app.amqp
        task = amqp.as_task_v2(
            task_id(message),
            PREFILL_TASK,
            kwargs=message._asdict(),
            argsrepr=f"{message.job} shard {message.shard} attempt {message.attempt}",
            kwargsrepr="{}",
            ignore_result=True,
        )
        headers = {_QUEUED_AT: queued_at}
        amqp.send_task_message(
            producer, PREFILL_TASK, task, queue=queue, declare=[], retry=False, headers=headers
        )

    def close(self) -> None:
        """Gives the connection up."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            with suppress(Exception):  # it may be the one that failed
                connection.release()
