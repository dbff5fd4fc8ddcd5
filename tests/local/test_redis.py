"""The embedded Redis as a supervised process."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdbatch.errors import ConfigError
from pdbatch.local.processes import redis_process
from pdbatch.local.redis import answers, server_argv, socket_url, wait_for_redis
from pdbatch.local.supervisor import Supervisor
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


def test_nobody_answers_where_nobody_is(tmp_path: Path) -> None:
    assert not answers(socket_url(tmp_path / "none.sock"))


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long") as caught:
        server_argv(tmp_path / ("x" * 100) / "redis.sock")
    assert "PDBATCH_HOME" in (caught.value.remedy or "")
