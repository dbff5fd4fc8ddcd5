"""The suite over the registry in memory and over a real server."""

from __future__ import annotations

import itertools
import shlex
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import redis

from kvxfer import Claim, MemoryRegistry, Publication, RedisRegistry, Registry, RegistryUnavailable
from kvxfer.testing import RegistrySuite

if TYPE_CHECKING:
    from tests.kvxfer.conftest import Server

_numbers = itertools.count()


ITEM = Publication("x", "p", "h", 1, b"d")


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

    def test_every_key_is_passed_in_and_has_one_hash_tag(self) -> None:
        """As the server sees it: each script's commands touch its own keys alone."""
        client = self.server.client()
        client.flushall()
        passed: set[str] = set()
        touched = 0
        with client.monitor() as monitor:
            walk(RedisRegistry(self.server.client(), "cluster"))
            self.server.client().echo("the end")
            for seen in monitor.listen():
                words = shlex.split(seen["command"])
                name = words[0].upper()
                if name == "ECHO":
                    break
                if name in ("EVALSHA", "EVAL"):
                    passed = set(words[3 : 3 + int(words[2])])
                    assert all(key.startswith("{cluster}:") for key in passed)
                elif seen["client_type"] == "lua" and name != "TIME":
                    touched += 1
                    assert words[1] in passed, words
        assert touched > 100

    def test_a_cluster_runs_it(self, cluster_node: Server) -> None:
        walk(RedisRegistry(cluster_node.client(), "cluster"))

    def test_another_object_may_release(self) -> None:
        """Then the producer's list is not known there; the producer hears of it all the same."""
        ours, other = (RedisRegistry(self.server.client(), "shared") for _ in range(2))
        ours.publish([ITEM], 60.0)
        (claim,) = ours.claim("c", "h", 1, 10, 60.0)
        assert other.fail([(claim.id, claim.fence)], "a\treason") == []
        assert ours.missing("p", ["x"]) == []
        (ended,) = ours.collect("p", 5.0)
        assert ended == ("x", "failed", "a\treason")
        assert ours.missing("p", ["x"]) == ["x"]

    def test_flushed_all_the_time(self) -> None:
        """Whatever the moment: no error but refusals, and no claim is held twice."""
        registry = RedisRegistry(self.server.client(), "flushed")
        client = self.server.client()
        stop = threading.Event()

        def flush() -> None:
            while not stop.is_set():
                client.flushall()
                client.script_flush()

        thread = threading.Thread(target=flush)
        thread.start()
        fences: set[int] = set()
        try:
            for turn in range(150):
                items = [ITEM._replace(id=f"{turn % 5}-{i}") for i in range(4)]
                registry.publish(items, 60.0)
                claims = registry.claim("c", "h", 4, 10, 60.0)
                assert not fences & {claim.fence for claim in claims}
                fences |= {claim.fence for claim in claims}
                registry.renew(map(_of, claims), 60.0)
                registry.release(map(_of, claims))
                registry.renew_published("p", ["0-0"], 60.0)
                registry.missing("p", ["0-0"])
                registry.collect("p", 0.0)
        finally:
            stop.set()
            thread.join()

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


def walk(registry: Registry) -> None:
    """Every operation once, the unusual turns too."""
    items = [ITEM._replace(id=f"i{i}", host="ab"[i % 2], producer="pq"[i % 2]) for i in range(8)]
    registry.publish(items, 60.0)
    claims = registry.claim("c", "a", 5, 1000, 60.0)
    assert [claim.id for claim in claims] == ["i0", "i2", "i4", "i6", "i1"]
    assert registry.renew(map(_of, claims), 60.0) == []
    assert registry.release(map(_of, claims[:2])) == []
    assert registry.fail(map(_of, claims[3:]), "why") == []
    assert [end.id for end in registry.collect("p", 5.0)] == ["i0", "i2", "i6"]
    assert [end.id for end in registry.collect("q", 5.0)] == ["i1"]
    assert registry.renew_published("p", ["i4", "i6"], 60.0) == ["i6"]
    assert registry.missing("q", ["i3", "i1"]) == ["i1"]
    registry.withdraw("q", ["i3"])
    registry.publish([ITEM._replace(id="short")], 0.01)
    assert [end.kind for end in registry.collect("p", 5.0)] == ["expired"]
    (short,) = registry.claim("c", "b", 1, 1000, 0.01)
    again: list[Claim] = []
    while not again:
        again = [c for c in registry.claim("c", "b", 9, 1000, 60.0) if c.id == short.id]
    assert again[0].fence > short.fence
    registry.sweep()


def _of(claim: Claim) -> tuple[str, int]:
    return claim.id, claim.fence
