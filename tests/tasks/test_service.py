"""The process of feeder and reconciler: it outlives outages and ends in order."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from celery import Celery
from redis import Redis
from redis_server import RedisServer

from pdbatch.config import Settings
from pdbatch.errors import StoreError
from pdbatch.ids import JobId
from pdbatch.queues import queue_name
from pdbatch.store import IngestRow, NewJob, Store
from tasks.service import HURRY_S, Service

QUEUE = queue_name("m")


def make_job(store: Store, num_shards: int) -> JobId:
    job = store.jobs.create(NewJob())
    with store.ingest(job, shard_size=1, default_model="m") as ingest:
        for index in range(num_shards):
            ingest.add(IngestRow(index, None, None, b'{"prompt":"Once"}', None))
    return job


def wait_until(met: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not met():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.02)


@pytest.fixture
def service(store: Store, settings: Settings, app: Celery) -> Iterator[Service]:
    made = Service(replace(settings, reconcile_every_s=0.1), store, app)
    yield made
    made.close()


@pytest.fixture
def running(service: Service) -> Iterator[threading.Thread]:
    stop = threading.Event()
    thread = threading.Thread(target=service.run, args=(stop,))
    thread.start()
    yield thread
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_a_hungry_queue_is_looked_at_soon(
    service: Service, store: Store, redis_client: Redis
) -> None:
    service._every_s = 10.0
    assert service.step() > HURRY_S
    make_job(store, 6)
    service._next_round_s = 0
    assert service.step() <= HURRY_S
    assert redis_client.llen(QUEUE) == 4
    assert service.step() > HURRY_S, "it is full now"
    assert redis_client.llen(QUEUE) == 4


def test_redis_comes_and_goes(
    running: threading.Thread,
    store: Store,
    redis_server: RedisServer,
    redis_client: Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tasks.service")
    redis_server.kill()
    job = make_job(store, 1)
    wait_until(lambda: caplog.text.count("failed and is tried again") >= 1)
    redis_server.start()
    wait_until(lambda: redis_client.llen(QUEUE) == 1)
    message = json.loads(redis_client.rpop(QUEUE))
    assert message["headers"]["id"] == f"{job}:0:1"
    assert running.is_alive()
    kinds = [r for r in caplog.records if "failed" in r.message and "feeding" in r.message]
    assert 1 <= len(kinds) <= 3, "told when it begins or changes, not at every try"


def test_a_database_that_is_away_is_told_once(
    running: threading.Thread,
    service: Service,
    store: Store,
    redis_client: Redis,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "tasks.service")
    tries = threading.Semaphore(0)

    def fail(*_: object) -> float:
        tries.release()
        raise StoreError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "now", fail)
        for _ in range(5):
            assert tries.acquire(timeout=30)
    make_job(store, 1)
    wait_until(lambda: redis_client.llen(QUEUE) == 1 and "goes on" in caplog.text)
    assert caplog.text.count("reconciling failed") == 1


def test_a_bug_does_not_end_it_and_shows_its_trace(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.feeder, "survey", lambda: [][0])
    for _ in range(3):
        service._next_round_s = 0
        service.step()
    assert caplog.text.count("Traceback") == 1 and "IndexError" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_feeds_and_ends_on_a_signal(
    store: Store, settings: Settings, redis_client: Redis, number: signal.Signals
) -> None:
    make_job(store, 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", "reconciler"],
        env={**os.environ, **settings.to_env()},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: redis_client.llen(QUEUE) == 1 or process.poll() is not None)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert f"{number.name}: ending" in log


def test_a_database_without_tables_is_told_at_the_start(settings: Settings) -> None:
    given = replace(settings, database_url=f"sqlite:///{settings.home}/other.db")
    done = subprocess.run(
        [sys.executable, "-m", "tasks", "reconciler"],
        env={**os.environ, **given.to_env()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4
    assert "pdbatch db upgrade" in done.stderr and "Traceback" not in done.stderr
