"""The reconciler: the dead are buried, the lost is published again, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from celery import Celery
from redis import Redis

from pdbatch.config import Settings
from pdbatch.ids import JobId, WorkerId
from pdbatch.queues import queue_name
from pdbatch.states import JobState
from pdbatch.store import IngestRow, NewJob, Store
from tasks.queue import Publisher
from tasks.reconciler import Reconciler

BODY = b'{"prompt":"Once"}'
QUEUE = queue_name("m")
LONG_AGO_S = 60.0


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reconciler(store: Store, redis_client: Redis, settings: Settings, clock: Clock) -> Reconciler:
    return Reconciler(store, redis_client, replace(settings, worker_ttl_s=8), clock)


@pytest.fixture
def publisher(app: Celery) -> Iterator[Publisher]:
    opened = Publisher(app)
    yield opened
    opened.close()


def make_job(store: Store, num_shards: int, deadline_at: float | None = None) -> JobId:
    job = store.jobs.create(NewJob(deadline_at=deadline_at))
    with store.ingest(job, shard_size=1, default_model="m") as ingest:
        for index in range(num_shards):
            ingest.add(IngestRow(index, None, None, BODY, None))
    return job


def take(store: Store, count: int, ago_s: float) -> list:
    """Shards noted as published so long ago; the messages are for the caller to send."""
    return store.shards.take_for_publish("m", 0, count, store.now() - ago_s)


def waiting(store: Store) -> int:
    return sum(queue.num_shards for queue in store.shards.pending_queues())


def silent_worker(store: Store, reconciler: Reconciler) -> WorkerId:
    """A worker that has claimed a shard and missed its time to live."""
    worker = store.workers.register("w", "host", "mixed", "m")
    (message,) = take(store, 1, 0)
    assert store.shards.claim(worker, *message) is not None
    reconciler._settings = replace(reconciler._settings, heartbeat_s=1e-9, worker_ttl_s=1e-9)
    return worker


def test_the_work_of_a_dead_worker_waits_again(store: Store, reconciler: Reconciler) -> None:
    make_job(store, 1)
    worker = silent_worker(store, reconciler)
    assert waiting(store) == 0
    assert reconciler.sweep() == 1
    assert waiting(store) == 1
    assert store.workers.heartbeat(worker) is False
    (message,) = take(store, 1, 0)
    assert message.attempt == 2
    assert reconciler.sweep() == 0


def test_a_worker_that_speaks_is_left_alone(store: Store, reconciler: Reconciler) -> None:
    store.workers.register("w", "host", "mixed", "m")
    assert reconciler.sweep() == 0
    assert len(store.workers.list()) == 1


def test_workers_that_ended_long_ago_are_forgotten(
    store: Store, reconciler: Reconciler, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["old", "other"]
    for name in names:
        store.workers.retire(store.workers.register(name, "host", "mixed", "m"))
    live = store.workers.register("live", "host", "mixed", "m")
    reconciler.sweep()
    assert len(store.workers.list(live_only=False)) == 3, "they ended just now"
    monkeypatch.setattr("tasks.reconciler._WORKERS_KEPT_S", -1.0)
    reconciler.sweep()
    assert len(store.workers.list(live_only=False)) == 3, "not before an hour is over"
    clock.now_s += 3600
    reconciler.sweep()
    assert [worker.id for worker in store.workers.list(live_only=False)] == [live]


def test_after_a_time_without_database_workers_get_a_chance_to_speak(
    store: Store, reconciler: Reconciler, clock: Clock
) -> None:
    worker = store.workers.register("w", "host", "mixed", "m")
    clock.now_s += 60
    settings = reconciler._settings
    assert reconciler.sweep() == 0
    reconciler._settings = replace(settings, heartbeat_s=1e-9, worker_ttl_s=1e-9)
    clock.now_s += 0.5
    reconciler._seen_at_s = clock.now_s
    assert reconciler.sweep() == 0 and store.workers.heartbeat(worker)
    clock.now_s += 2 * settings.heartbeat_s
    reconciler._seen_at_s = clock.now_s
    assert reconciler.sweep() == 1


def test_jobs_past_their_deadline_end(store: Store, reconciler: Reconciler) -> None:
    job = make_job(store, 2, deadline_at=store.now() - 1)
    assert reconciler.sweep() == 1
    assert store.jobs.get(job).state is JobState.EXPIRED


def test_messages_of_an_emptied_redis_come_again(store: Store, reconciler: Reconciler) -> None:
    make_job(store, 5)
    messages = take(store, 5, LONG_AGO_S)
    assert reconciler.requeue() == 5
    assert take(store, 5, 0) == messages
    assert reconciler.requeue() == 0, "published a moment ago"


def test_messages_that_lie_in_the_queue_are_left_there(
    store: Store, reconciler: Reconciler, publisher: Publisher, redis_client: Redis
) -> None:
    make_job(store, 6)
    old = store.now() - LONG_AGO_S
    publisher.publish(QUEUE, store.shards.take_for_publish("m", 0, 3, old), old)
    young = old + 30
    publisher.publish(QUEUE, store.shards.take_for_publish("m", 0, 3, young), young)
    assert reconciler.requeue() == 0
    redis_client.rpop(QUEUE)
    assert reconciler.requeue() == 0, "its fellows of the same time still lie there"
    redis_client.rpop(QUEUE, 2)
    assert reconciler.requeue() == 3, "lost: those after them have come to the front"
    redis_client.rpop(QUEUE, 3)
    assert reconciler.requeue() == 3
    assert waiting(store) == 6


def test_a_message_of_unknown_age_holds_everything(
    store: Store, reconciler: Reconciler, redis_client: Redis
) -> None:
    make_job(store, 1)
    take(store, 1, LONG_AGO_S)
    for foreign in (b"no JSON", b"[]", b'{"headers": {}}'):
        redis_client.delete(QUEUE)
        redis_client.lpush(QUEUE, foreign)
        assert reconciler.requeue() == 0
    redis_client.delete(QUEUE)
    assert reconciler.requeue() == 1


def test_claimed_shards_are_nobody_elses(store: Store, reconciler: Reconciler) -> None:
    make_job(store, 1)
    worker = store.workers.register("w", "host", "mixed", "m")
    (message,) = take(store, 1, LONG_AGO_S)
    assert store.shards.claim(worker, *message) is not None
    assert reconciler.requeue() == 0


def test_two_reconcilers_do_it_once(
    store: Store, reconciler: Reconciler, redis_client: Redis, settings: Settings
) -> None:
    make_job(store, 4)
    take(store, 3, LONG_AGO_S)
    silent_worker(store, reconciler)
    other = Reconciler(store, redis_client, reconciler._settings)
    assert reconciler.sweep() + other.sweep() == 1
    assert reconciler.requeue() + other.requeue() == 3
    assert waiting(store) == 4
