"""A real Redis (Valkey) for the tests of `tasks`, emptied for each, and settings that name it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from redis_server import RedisServer

from pdbatch.config import Settings
from pdbatch.queues import connect
from tasks.app import build_app


@pytest.fixture(scope="session")
def _one_redis() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="pdbatch-redis-"))
    server = RedisServer(folder)
    yield server
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_server(_one_redis: RedisServer) -> RedisServer:
    """A running, empty server."""
    _one_redis.start()
    client = connect(_one_redis.url)
    client.flushall()
    client.close()
    return _one_redis


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Iterator[Redis]:
    client = connect(redis_server.url)
    yield client
    client.close()


@pytest.fixture
def settings(redis_server: RedisServer, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Settings of that Redis, and of the test's database where it has one."""
    url = request.getfixturevalue("database_url") if "store" in request.fixturenames else ""
    return Settings(home=tmp_path, database_url=url, broker_url=redis_server.url, model="m")


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    built = build_app(settings)
    yield built
    built.close()
