"""The feeder against a real Redis: what lies in the queues, in which order, how much of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from redis import Redis, RedisError
from redis_server import RedisServer

from pdbatch.config import Settings
from pdbatch.ids import JobId, ShardIndex
from pdbatch.queues import queue_name
from pdbatch.store import IngestRow, NewJob, ShardMessage, Store
from tasks.feeder import LEAST_DEPTH, Feeder
from tasks.queue import Publisher, open_client, task_id

BODY = b'{"prompt":"Once"}'
QUEUE = queue_name("m")


def make_job(store: Store, num_shards: int, priority: int = 0, model: str = "m") -> JobId:
    """A job of shards of one request."""
    job = store.jobs.create(NewJob(priority=priority))
    with store.ingest(job, shard_size=1, default_model=model) as ingest:
        for index in range(num_shards):
            ingest.add(IngestRow(index, None, None, BODY, None))
    return job


@pytest.fixture
def publisher(app: Celery) -> Iterator[Publisher]:
    opened = Publisher(app)
    yield opened
    opened.close()


@pytest.fixture
def feeder(
    store: Store, redis_client: Redis, publisher: Publisher, settings: Settings
) -> Iterator[Feeder]:
    client = open_client(settings.broker_url or "")
    yield Feeder(store, client, publisher, settings)
    client.close()


def take(client: Redis, count: int = 1, queue: str = QUEUE) -> list[dict[str, Any]]:
    """The next messages, as a worker gets them."""
    return [json.loads(raw) for raw in client.rpop(queue, count) or []]


def _ids(messages: list[dict[str, Any]]) -> list[str]:
    return [message["headers"]["id"] for message in messages]


def test_a_message_says_ids_and_reads_well(
    store: Store, feeder: Feeder, redis_client: Redis, app: Celery
) -> None:
    job = make_job(store, 1)
    before = store.now()
    assert feeder.survey() is False
    with app.connection_for_read() as connection, connection.channel() as channel:
        message = channel.basic_get(QUEUE)
    assert message.payload[:2] == [[], {"job": job, "shard": 0, "attempt": 1}]
    headers = message.headers
    assert headers["task"] == "pdbatch.prefill" and headers["id"] == f"{job}:0:1"
    assert headers["argsrepr"] == f"{job} shard 0 attempt 1" and headers["ignore_result"]
    assert before <= headers["queued_at"] <= store.now()
    assert redis_client.llen(QUEUE) == 0


def test_every_shard_is_published_once(store: Store, feeder: Feeder, redis_client: Redis) -> None:
    job = make_job(store, 300)
    seen: list[str] = []
    for _ in range(100):
        feeder.survey()
        seen += _ids(take(redis_client, 1000))
    assert seen == [f"{job}:{shard}:1" for shard in range(300)]
    assert store.shards.pending_queues() == []


def test_a_queue_that_nobody_reads_stays_short(
    store: Store, feeder: Feeder, redis_client: Redis
) -> None:
    make_job(store, 100)
    for _ in range(20):
        feeder.survey()
    assert redis_client.llen(QUEUE) == 2 * LEAST_DEPTH


def test_a_queue_that_is_read_fast_grows_to_the_upper_mark_and_shrinks_again(
    store: Store, feeder: Feeder, redis_client: Redis, settings: Settings
) -> None:
    make_job(store, 1000)
    hungry, lengths = feeder.survey(), []
    while hungry and len(lengths) < 8:
        lengths.append(redis_client.llen(QUEUE))
        take(redis_client, 1000)
        hungry = feeder.refill()
    assert lengths == [4, 8, 16, 32, 64, 64, 64, 64] and settings.queue_high == 64
    for _ in range(80):  # one shard a round from now on
        feeder.survey()
        take(redis_client)
    assert redis_client.llen(QUEUE) <= LEAST_DEPTH


def test_a_small_job_does_not_wait_for_a_huge_one(
    store: Store, feeder: Feeder, redis_client: Redis
) -> None:
    make_job(store, 1000)
    for _ in range(20):
        feeder.survey()
        take(redis_client)
    small = make_job(store, 2)
    seen: list[str] = []
    for _ in range(8):
        feeder.survey()
        seen += _ids(take(redis_client))
    assert {f"{small}:0:1", f"{small}:1:1"} <= set(seen)


def test_priorities_and_models_have_queues_of_their_own(
    store: Store, feeder: Feeder, redis_client: Redis
) -> None:
    given = [(0, "m"), (-1, "m"), (1, "m"), (0, "other")]
    jobs = {key: make_job(store, 1, *key) for key in given}
    feeder.survey()
    for (priority, model), job in jobs.items():
        assert _ids(take(redis_client, 9, queue_name(model, priority))) == [f"{job}:0:1"]


def test_two_feeders_share_the_work(
    store: Store, app: Celery, redis_client: Redis, settings: Settings
) -> None:
    job = make_job(store, 100)
    publishers = [Publisher(app), Publisher(app)]
    feeders = [Feeder(store, redis_client, each, settings) for each in publishers]
    seen: list[str] = []
    for turn in range(100):
        feeders[turn % 2].survey()
        seen += _ids(take(redis_client, 1000))
    assert sorted(seen) == sorted(f"{job}:{shard}:1" for shard in range(100))
    for publisher in publishers:
        publisher.close()


def test_without_redis_nothing_is_taken_and_then_it_goes_on(
    store: Store, feeder: Feeder, redis_server: RedisServer, redis_client: Redis
) -> None:
    job = make_job(store, 3)
    redis_server.kill()
    start = time.monotonic()
    with pytest.raises((RedisError, OSError)):
        feeder.survey()
    assert time.monotonic() - start < 5
    assert store.shards.pending_queues()[0].num_shards == 3
    redis_server.start()
    feeder.survey()
    assert _ids(take(redis_client, 9)) == [f"{job}:{shard}:1" for shard in range(3)]


def test_a_publish_that_failed_connects_anew(
    publisher: Publisher, redis_server: RedisServer, redis_client: Redis
) -> None:
    messages = [ShardMessage(JobId("job_x"), ShardIndex(shard), 1) for shard in range(1200)]
    publisher.publish(QUEUE, messages, 1.0)
    assert _ids(take(redis_client, 5000)) == [task_id(message) for message in messages]
    redis_server.kill()
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)connect|batch|refused|no such file"):
            publisher.publish(QUEUE, messages, 1.0)
    redis_server.start()
    publisher.publish(QUEUE, messages, 1.0)
    assert redis_client.llen(QUEUE) == 1200
