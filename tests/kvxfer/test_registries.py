"""The suite over the registry in memory and over a real server."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvxfer import MemoryRegistry, Publication, RedisRegistry, Registry, RegistryUnavailable
from kvxfer.testing import RegistrySuite
from pdbatch.local.redis import server_argv

_numbers = itertools.count()


class Server:
    """A Valkey on a socket of its own, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(server_argv(self.socket), stdout=subprocess.DEVNULL)
        client = self.client()
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                return
            except redis.RedisError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        found = Server(Path(folder))
        yield found
        found.stop()


class TestMemory(RegistrySuite):
    def make(self) -> Registry:
        return MemoryRegistry()

    def empty(self, registry: Registry) -> None:
        assert isinstance(registry, MemoryRegistry)
        registry.clear()


class TestRedis(RegistrySuite):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server

    def make(self) -> Registry:
        return RedisRegistry(self.server.client(), f"test{next(_numbers)}")

    def empty(self, registry: Registry) -> None:
        self.server.client().flushall()
        self.server.client().script_flush()

    def test_every_key_has_one_hash_tag(self) -> None:
        self.server.client().flushall()
        registry = RedisRegistry(self.server.client(), "cluster")
        registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        (claim,) = registry.claim("c", "h", 1, 10, 60.0)
        registry.release([(claim.id, claim.fence)])
        keys = self.server.client().keys("*")
        assert keys and all(key.startswith(b"{cluster}:") for key in keys)

    def test_a_server_that_is_away_is_unavailable_and_then_back(self) -> None:
        registry = self.make()
        registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        self.server.stop()
        with pytest.raises(RegistryUnavailable):
            registry.claim("c", "h", 1, 10, 60.0)
        with pytest.raises(RegistryUnavailable):
            registry.collect("p", 0.1)
        self.server.start()
        registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        assert [claim.id for claim in registry.claim("c", "h", 1, 10, 60.0)] == ["x"]
