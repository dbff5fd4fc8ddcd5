"""The suite over the registry in memory and over a real server."""

from __future__ import annotations

import itertools
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

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
        return redis.Redis(
            unix_socket_path=str(self.socket), socket_timeout=2, retry=Retry(NoBackoff(), 0)
        )


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

    def test_nothing_is_left_behind_when_all_has_ended(self) -> None:
        self.server.client().flushall()
        registry = self.make()
        items = [Publication(f"i{i}", "p", f"h{i % 3}", 1, b"d") for i in range(90)]
        registry.publish(items, 60.0)
        claims = registry.claim("c", "h1", 70, 100, 60.0)
        registry.release([(claim.id, claim.fence) for claim in claims[:35]])
        registry.fail([(claim.id, claim.fence) for claim in claims[35:]], "why")
        registry.withdraw("p", [item.id for item in items])
        assert len(registry.collect("p", 1.0)) == 70
        (left,) = self.server.client().keys("*")
        assert left.endswith(b":seq")

    def test_scripts_that_the_server_forgot_are_loaded_again(self) -> None:
        registry = self.make()
        registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        self.server.client().script_flush()
        (claim,) = registry.claim("c", "h", 1, 10, 60.0)
        self.server.client().script_flush()
        assert registry.release([(claim.id, claim.fence)]) == []

    def test_a_wait_may_be_longer_than_the_socket_time_out(self) -> None:
        registry = self.make()
        start = time.monotonic()
        assert registry.collect("p", 2.5) == []
        assert 2.4 < time.monotonic() - start < 10

    def test_a_connection_that_ends_in_a_wait_is_unavailable(self) -> None:
        registry = self.make()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(registry.collect, "p", 20.0)
            admin = self.server.client()
            deadline = time.monotonic() + 10
            while not (blocked := [c for c in admin.client_list() if "b" in c["flags"]]):
                assert time.monotonic() < deadline, "it never waited"
            admin.client_kill_filter(_id=blocked[0]["id"])
            with pytest.raises(RegistryUnavailable):
                waiting.result(10)
        assert registry.collect("p", 0.0) == []

    def test_a_stopped_server_is_unavailable_within_the_socket_time_out(self) -> None:
        registry = self.make()
        registry.depth()
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            with pytest.raises(RegistryUnavailable):
                registry.depth()
            assert time.monotonic() - start < 8
        finally:
            self.server.process.send_signal(signal.SIGCONT)
        assert registry.depth() == 0

    def test_a_foreign_value_under_our_key_is_no_outage(self) -> None:
        namespace = f"test{next(_numbers)}"
        registry = RedisRegistry(self.server.client(), namespace)
        self.server.client().set(f"{{{namespace}}}:m", "not a hash")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)

    def test_a_full_server_is_unavailable(self) -> None:
        registry = self.make()
        admin = self.server.client()
        admin.config_set("maxmemory", 1)
        try:
            with pytest.raises(RegistryUnavailable):
                registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        finally:
            admin.config_set("maxmemory", 0)
        registry.publish([Publication("x", "p", "h", 1, b"d")], 60.0)
        assert registry.depth() == 1

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
