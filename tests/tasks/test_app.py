"""The Celery application: addresses, routes, a patient acknowledgement."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu.asynchronous.timer import Timer
from kombu.transport.redis import Channel
from redis import Redis
from redis_server import RedisServer

from pdbatch.config import Settings
from pdbatch.queues import GENERATE_QUEUE, queue_names
from tasks.app import SteadyRequest, build_app, celery_url, configuration
from tasks.events import Events


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://a:1/2", "redis://a:1/2"),
        ("rediss://a:1/2", "rediss://a:1/2"),
        ("valkey://a:1/2", "redis://a:1/2"),
        ("valkeys://a:1/2", "rediss://a:1/2"),
        ("unix:///run/r.sock?db=3", "redis+socket:///run/r.sock?virtual_host=3"),
        ("redis+socket:///run/r.sock", "redis+socket:///run/r.sock"),
    ],
)
def test_addresses_are_spelt_as_celery_does(url: str, expected: str) -> None:
    assert celery_url(url) == expected


def test_broker_and_results_go_over_a_unix_socket(app: Celery, redis_client: Redis) -> None:
    app.send_task("pdbatch.generate", ("a prompt",))
    assert redis_client.llen(GENERATE_QUEUE) == 1
    app.backend.store_result("some-id", {"text": "x"}, "SUCCESS")
    assert app.AsyncResult("some-id").get(timeout=5) == {"text": "x"}


def test_the_database_number_of_a_socket_is_kept(settings: Settings, redis_client: Redis) -> None:
    other = build_app(replace(settings, broker_url=f"{settings.broker_url}?virtual_host=2"))
    other.send_task("pdbatch.generate", ("a prompt",))
    other.backend.store_result("some-id", 1, "SUCCESS")
    assert redis_client.keys() == []
    redis_client.select(2)
    assert redis_client.llen(GENERATE_QUEUE) == 1
    assert redis_client.exists("celery-task-meta-some-id") == 1
    other.close()


def test_a_worker_listens_to_its_model_in_order_of_priority(app: Celery) -> None:
    assert list(app.amqp.queues.consume_from) == [*queue_names("m"), GENERATE_QUEUE]
    with app.connection_for_read() as connection, connection.channel() as channel:
        assert isinstance(channel, Channel)
        assert channel.queue_order_strategy == "priority"
        assert channel.priority_steps == [0]
        assert channel.unacked_mutex_expire == 30
        assert channel.do_restore is False


def test_a_channel_has_one_client_for_each_pool(app: Celery) -> None:
    with app.connection_for_read() as connection, connection.channel() as channel:
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
        assert channel.client is not first  # that of the event loop is another
        channel._disconnect_pools()
        with channel.conn_or_acquire() as later:
            assert later is not first
            assert later.connection_pool is channel.pool
            assert later.ping()


class _Consumer:
    """What `tasks.events` needs of a consumer."""

    def __init__(self) -> None:
        self.published: list[list[str]] = []
        self.waiting: list[str] = []
        self.timer = Timer()
        self.event_dispatcher: Any = SimpleNamespace(
            buffer_limit=24, on_send_buffered=self._flush, flush=self._flush
        )
        self.on_send_event_buffered = self._flush

    def send(self, event: str) -> None:
        self.waiting.append(event)
        self.event_dispatcher.on_send_buffered()

    def _flush(self) -> None:
        self.published.append(self.waiting)
        self.waiting = []


def test_events_wait_for_others() -> None:
    consumer = _Consumer()
    step = Events(consumer)
    step.start(consumer)
    consumer.send("received")
    consumer.send("started")
    assert consumer.published == []
    assert len(consumer.timer.queue) == 1
    consumer.timer.apply_entry(consumer.timer.queue[0].entry)  # its time has come
    assert consumer.published == [["received", "started"]]
    consumer.send("succeeded")
    step.stop(consumer)
    assert consumer.published == [["received", "started"], ["succeeded"]]


def test_a_result_backend_of_its_own(settings: Settings) -> None:
    given = configuration(replace(settings, result_backend="redis://elsewhere/1"))
    assert given["broker_url"] == settings.broker_url
    assert given["result_backend"] == "redis://elsewhere/1"
    assert given["redis_socket_keepalive"] is True
    assert configuration(settings)["redis_socket_keepalive"] is False


class _Message:
    """What Celery's Request needs of a message."""

    headers = {"id": "t1", "task": "pdbatch.generate"}  # noqa: RUF012
    body = "[[], {}, {}]"
    payload = ((), {}, {})
    content_type = "application/json"
    content_encoding = "utf-8"
    delivery_info: dict[str, Any] = {}  # noqa: RUF012
    properties: dict[str, Any] = {}  # noqa: RUF012


@pytest.mark.parametrize(
    "error", [AttributeError("'NoneType' object has no attribute 'hostname'"), BrokenPipeError()]
)
def test_an_acknowledgement_survives_the_loss_of_redis(
    app: Celery, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    request = SteadyRequest(_Message(), app=app, task=app.Task(), on_ack=fail, on_reject=fail)
    with caplog.at_level(logging.WARNING, "tasks.app"):
        request.acknowledge()
        request.reject(requeue=True)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "t1 was not acknowledged" in caplog.text and "t1 was not rejected" in caplog.text
    assert not request.acknowledged


def test_an_acknowledgement_is_passed_on_once(app: Celery) -> None:
    calls: list[Any] = []
    request = SteadyRequest(
        _Message(), app=app, task=app.Task(), on_ack=lambda *given: calls.append(given)
    )
    request.acknowledge()
    request.acknowledge()
    assert len(calls) == 1 and request.acknowledged


def test_importing_reads_no_settings_and_delay_sends_to_the_queue(
    redis_server: RedisServer, redis_client: Redis, settings: Settings
) -> None:
    code = (
        "import os, tasks; os.environ.pop('PDBATCH_NOSUCH');"
        "tasks.generate.delay('a prompt', max_tokens=3); print(tasks.prefill.ignore_result)"
    )
    env = {**os.environ, **settings.to_env(), "PDBATCH_NOSUCH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
    message = json.loads(redis_client.rpop(GENERATE_QUEUE))
    assert message["headers"]["task"] == "pdbatch.generate"
    assert message["headers"]["argsrepr"] == "('a prompt',)"
    assert message["content-type"] == "application/json"
