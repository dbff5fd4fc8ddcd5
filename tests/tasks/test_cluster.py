"""Real workers, real Redis, both databases: a job's way, and what it survives."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cluster import Cluster
from redis import Redis
from redis_server import RedisServer

from pdbatch.config import Settings
from pdbatch.store import Store

pytestmark = pytest.mark.slow

FAST = {
    "engine": "null",
    "heartbeat_s": 0.25,
    "worker_ttl_s": 2.0,
    "requeue_after_s": 1.0,
    "reconcile_every_s": 0.1,
    "kv_lease_s": 4.0,
    "claim_lease_s": 2.0,
    "max_attempts": 1000,
    "worker_threads": 1,
}


@pytest.fixture
def cluster(settings: Settings, store: Store) -> Iterator[Cluster]:
    """A cluster with nothing started, on the test's database."""
    found = Cluster(replace(settings, **FAST), store)  # type: ignore[arg-type]
    yield found
    found.close()


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """SQLite, unless a test asks for more."""
    kind = getattr(request, "param", "sqlite")
    url = request.getfixturevalue("pg_store_url" if kind == "postgres" else "sqlite_store_url")
    assert isinstance(url, str)
    return url


both = pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)],
    indirect=True,
)


@both
def test_a_job_goes_through_prefill_and_decode(cluster: Cluster) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(500)
    view = cluster.finish(job)
    assert view.tokens.output == sum(1 + index % 3 for index in range(500))
    rows = list(cluster.store.results.iterate(job))
    assert all(row.output_tokens == 1 + row.index % 3 for row in rows)
    cluster.assert_idle()
    assert {name: cluster.stop(name) for name in cluster.processes} == dict.fromkeys(
        cluster.processes, 0
    )
    assert cluster.store.workers.list() == []


def test_a_mixed_worker_does_it_alone(cluster: Cluster) -> None:
    cluster.start("reconciler", "mixed-1")
    cluster.finish(cluster.submit(300))
    cluster.assert_idle()


def test_redis_emptied_again_and_again(cluster: Cluster, redis_client: Redis) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(3000)
    for share in (0.1, 0.3, 0.5, 0.7):
        cluster.wait("progress", lambda share=share: cluster.done(job) >= 3000 * share)
        redis_client.flushall()
    cluster.finish(job)
    cluster.assert_idle()


def test_redis_killed_and_back(cluster: Cluster, redis_server: RedisServer) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(3000)
    for share in (0.2, 0.6):
        cluster.wait("progress", lambda share=share: cluster.done(job) >= 3000 * share)
        redis_server.kill()
        redis_server.start()
        cluster.restart_ended()
    cluster.finish(job)
    cluster.assert_idle()


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
@both
def test_a_worker_killed(cluster: Cluster, victim: str) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(3000)
    cluster.wait("progress", lambda: cluster.done(job) > 500)
    cluster.kill(victim)
    cluster.start(victim)
    cluster.finish(job)
    cluster.assert_idle()


def test_a_worker_that_never_comes_back_is_replaced_by_another(cluster: Cluster) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1", "prefill-2", "decode-2")
    job = cluster.submit(3000)
    cluster.wait("progress", lambda: cluster.done(job) > 500)
    cluster.kill("prefill-1")
    cluster.kill("decode-1")
    cluster.finish(job)
    cluster.assert_idle()


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
@both
def test_a_worker_stopped_for_longer_than_its_time_to_live(cluster: Cluster, victim: str) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(4000)
    cluster.wait("progress", lambda: cluster.done(job) > 500)
    cluster.pause(victim)
    cluster.wait("its death", lambda: victim not in cluster.live())
    before = {worker.id for worker in cluster.store.workers.list()}
    cluster.send(victim, signal.SIGCONT)
    cluster.wait("its new life", lambda: victim in cluster.live())
    assert {worker.id for worker in cluster.store.workers.list()} > before
    cluster.finish(job)
    cluster.assert_idle()
    assert cluster.processes[victim].poll() is None


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1", "mixed-1"])
def test_an_engine_killed_ends_its_worker(cluster: Cluster, victim: str) -> None:
    names = ["mixed-1"] if victim == "mixed-1" else ["prefill-1", "decode-1"]
    cluster.start("reconciler", *names)
    job = cluster.submit(3000)
    cluster.wait("progress", lambda: cluster.done(job) > 300)
    cluster.family(victim)[1].kill()
    assert cluster.processes[victim].wait(15) == 70
    assert victim not in {worker.name for worker in cluster.store.workers.list()}
    cluster.start(victim)
    cluster.finish(job)
    cluster.assert_idle()


def test_a_drained_worker_leaves_in_order_and_the_others_go_on(cluster: Cluster) -> None:
    cluster.start("reconciler", "prefill-1", "prefill-2", "decode-1", "decode-2")
    job = cluster.submit(20_000)  # enough to be under way until both are gone
    for victim in ("decode-1", "prefill-1"):
        before = cluster.done(job)
        cluster.wait("progress", lambda before=before: cluster.done(job) > before + 300)
        assert cluster.stop(victim) == 0
        states = {w.name: w.state for w in cluster.store.workers.list(live_only=False)}
        assert states[victim] == "retired"
    cluster.finish(job)
    cluster.assert_idle()


def test_two_reconcilers_one_of_them_killed(cluster: Cluster) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    first = cluster.processes.pop("reconciler")
    cluster.start("reconciler")
    job = cluster.submit(2000)
    cluster.wait("progress", lambda: cluster.done(job) > 300)
    first.kill()
    first.wait()
    cluster.finish(job)


def test_a_message_of_another_database_is_dropped(cluster: Cluster, app: object) -> None:
    cluster.start("reconciler", "mixed-1")
    from pdbatch.ids import ShardIndex, new_job_id
    from pdbatch.queues import queue_name
    from pdbatch.store import ShardMessage
    from tasks.queue import Publisher

    stray = ShardMessage(new_job_id(), ShardIndex(0), 1)
    Publisher(app).publish(queue_name("m"), [stray], 0.0)  # type: ignore[arg-type]
    cluster.finish(cluster.submit(100))
    assert cluster.processes["mixed-1"].poll() is None


@both
def test_a_walk_of_disturbances(
    cluster: Cluster, redis_client: Redis, redis_server: RedisServer
) -> None:
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    rng = random.Random(seed)
    workers = ["prefill-1", "prefill-2", "decode-1", "decode-2"]
    cluster.start("reconciler", *workers)
    job = cluster.submit(6000)
    for _ in range(8):
        reached = min(6000, cluster.done(job) + 300)

        def progressed(reached: int = reached) -> bool:
            cluster.restart_ended()
            return cluster.done(job) >= reached

        cluster.wait("progress", progressed)
        kind, victim = rng.choice(["kill", "engine", "stop", "empty", "redis"]), rng.choice(workers)
        print(kind, victim)
        if kind == "empty":
            redis_client.flushall()
        elif kind == "redis":
            redis_server.kill()
            redis_server.start()
        elif kind == "stop":
            cluster.pause(victim)
            cluster.wait("its death", lambda victim=victim: victim not in cluster.live())
            cluster.send(victim, signal.SIGCONT)
        elif kind == "kill":
            cluster.kill(victim)
        else:
            cluster.family(victim)[1].kill()
            cluster.processes[victim].wait(20)
        cluster.restart_ended()
    cluster.finish(job, 120)
    cluster.assert_idle()
