"""The embedded Redis as a supervised process."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdbatch.errors import ConfigError
from pdbatch.local.processes import redis_process
from pdbatch.local.redis import answers, server_argv, socket_url, wait_for_redis
from pdbatch.local.supervisor import Exit, Supervisor
from pdbatch.queues import connect


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run" / "redis.sock"
    supervisor = Supervisor([redis_process(path, tmp_path / "redis.log")])
    supervisor.start()
    yield path
    assert supervisor.stop(10) == []


def test_it_starts_answers_and_is_ours_alone(socket_path: Path) -> None:
    url = socket_url(socket_path)
    assert int(wait_for_redis(url).split(".")[0]) >= 7
    client = connect(url)
    client.set("a", 1)
    assert client.get("a") == b"1"
    assert client.config_get("save") == {"save": ""}
    assert client.config_get("appendonly") == {"appendonly": "no"}
    assert client.config_get("port") == {"port": "0"}
    client.close()
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700


def test_it_starts_again_at_the_same_place_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run" / "redis.sock"
    exits: list[Exit] = []
    supervisor = Supervisor([redis_process(path)], on_exit=exits.append)
    supervisor.start()
    try:
        wait_for_redis(socket_url(path))
        os.kill(supervisor.pid("redis") or 0, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not (exits and supervisor.pid("redis")):
            assert time.monotonic() < deadline
            supervisor.step()
            supervisor.wait(0.1)
        wait_for_redis(socket_url(path))
    finally:
        supervisor.stop(10)


def test_nobody_answers_where_nobody_is(tmp_path: Path) -> None:
    assert not answers(socket_url(tmp_path / "none.sock"))


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long") as caught:
        server_argv(tmp_path / ("x" * 100) / "redis.sock")
    assert "PDBATCH_HOME" in (caught.value.remedy or "")
