"""Live workers as Celery sees them: `generate`, groups, chords, inspect, revoke, Flower."""

from __future__ import annotations

import gc
import json
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery, chord, group
from celery.exceptions import TaskRevokedError
from cluster import Cluster
from redis_server import RedisServer
from test_cluster import FAST, both, cluster, database_url

from pdbatch.config import Settings
from pdbatch.queues import PREFILL_TASK
from pdbatch.states import TERMINAL_JOB_STATES, JobState
from tasks.generate import GenerateRejected, job_of

__all__ = ["cluster", "database_url"]
pytestmark = pytest.mark.slow


@pytest.fixture
def app(app: Celery) -> Iterator[Celery]:
    """The test's application, with our tasks known to it. Results that an error's traceback keeps
    unsubscribe when they are let go: here, and not when Redis is gone."""
    app.loader.import_default_modules()
    with app.connection_for_write():
        yield app
    gc.collect()


def signature(app: Celery, *args: Any, **kwargs: Any) -> Any:
    return app.signature("pdbatch.generate", args=args, kwargs=kwargs)


@both
def test_generate_groups_and_chords(cluster: Cluster, app: Celery) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    answer = signature(app, "Hello there", max_tokens=3).delay().get(timeout=30)
    assert (answer["text"], answer["finish_reason"]) == ("xxx", "length")
    assert answer["usage"]["completion_tokens"] == 3
    assert cluster.store.jobs.get(answer["job"]).counts.succeeded == 1

    many = group(signature(app, f"prompt {n}", max_tokens=2 + n % 3) for n in range(40))
    answers = many.apply_async().get(timeout=60)
    assert [len(a["token_ids"]) for a in answers] == [2 + n % 3 for n in range(40)]

    body = app.signature("celery.accumulate")
    told = chord((signature(app, f"part {n}", max_tokens=2) for n in range(20)), app=app)(body)
    assert [each["text"] for each in told.get(timeout=60)[0]] == ["xx"] * 20
    cluster.assert_idle()


def test_generate_tells_what_is_wrong(cluster: Cluster, app: Celery) -> None:
    cluster.start("reconciler", "mixed-1")
    with pytest.raises(GenerateRejected, match="temperature"):
        signature(app, "x", temperature=1000).delay().get(timeout=30)
    with pytest.raises(GenerateRejected, match="max_tokns"):
        signature(app, "x", max_tokns=9).delay().get(timeout=30)
    failed = chord([signature(app, "x"), signature(app, "x", top_p=7)], app=app)(
        app.signature("celery.accumulate")
    )
    with pytest.raises(Exception, match="top_p"):
        failed.get(timeout=30)


def test_generate_starts_at_once_behind_a_huge_job(cluster: Cluster, app: Celery) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    job = cluster.submit(8000)
    cluster.wait("progress", lambda: cluster.done(job) > 200)
    waited = []
    for _ in range(3):
        began = time.monotonic()
        signature(app, "me first", max_tokens=2).delay().get(timeout=30)
        waited.append(time.monotonic() - began)
    assert cluster.store.jobs.get(job).state is JobState.IN_PROGRESS, "too small a job"
    assert sorted(waited)[1] < 3.0, waited
    cluster.store.jobs.cancel(job)


def test_open_generates_of_a_drained_worker_are_answered_by_another(
    cluster: Cluster, app: Celery
) -> None:
    cluster.start("reconciler", "prefill-1", "prefill-2")  # no decode worker: nothing ends
    open_tasks = [signature(app, f"prompt {n}", max_tokens=2).delay() for n in range(10)]
    jobs = [job_of(task.id) for task in open_tasks]
    cluster.wait("jobs", lambda: len(cluster.store.jobs.states(jobs)) == 10)
    assert cluster.stop("prefill-1") == 0
    cluster.start("decode-1")
    assert [task.get(timeout=60)["text"] for task in open_tasks] == ["xx"] * 10


def test_generate_works_again_after_redis_was_killed(
    cluster: Cluster, app: Celery, redis_server: RedisServer
) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    assert signature(app, "before", max_tokens=2).delay().get(timeout=30)["text"] == "xx"
    redis_server.kill()
    redis_server.start()
    cluster.restart_ended()
    assert signature(app, "after", max_tokens=2).delay().get(timeout=30)["text"] == "xx"


def test_workers_show_themselves(cluster: Cluster, app: Celery) -> None:
    cluster.start("reconciler", "prefill-1", "decode-1")
    inspect = app.control.inspect(timeout=2)
    cluster.wait("answers to a ping", lambda: len(inspect.ping() or {}) == 2, 20)
    stats = inspect.stats()
    pools = {name.split("@")[0]: each["pool"] for name, each in stats.items()}
    assert pools["prefill-1"]["role"] == "prefill" and pools["decode-1"]["role"] == "decode"
    for pool in pools.values():
        assert pool["model"] == "m" and pool["device"] == "cpu"
        assert pool["kv-blocks-free"] == pool["kv-blocks-total"] > 0
        assert pool["sequences-running"] == 0
    assert set(inspect.registered()) == set(stats)
    job = cluster.submit(32)
    cluster.pause("decode-1")
    shown: list[Any] = []

    def active() -> bool:
        found = app.control.inspect(timeout=1).active() or {}
        shown[:] = [task for tasks in found.values() for task in tasks]
        return bool(shown)

    cluster.wait("active shards", active, 15)
    cluster.send("decode-1", signal.SIGCONT)
    assert {task["name"] for task in shown} == {PREFILL_TASK}
    assert {task["kwargs"]["job"] for task in shown} == {job}
    cluster.finish(job)


def test_revoked_shards_and_generates_are_cancelled(cluster: Cluster, app: Celery) -> None:
    cluster.start("reconciler", "prefill-1")  # no decode worker: nothing ends
    job = cluster.submit(64, least_tokens=2)
    inspect = app.control.inspect(timeout=1)

    def active(name: str) -> list[str]:
        found = inspect.active() or {}
        return [t["id"] for tasks in found.values() for t in tasks if t["name"] == name]

    cluster.wait("four active shards", lambda: len(active(PREFILL_TASK)) == 4, 20)
    victim = active(PREFILL_TASK)[0]
    app.control.revoke(victim, terminate=True)
    cluster.wait("its rows", lambda: cluster.done(job) == 16, 20)
    assert cluster.store.jobs.get(job).counts.failed == 16
    cluster.wait("three active shards", lambda: len(active(PREFILL_TASK)) == 3, 20)

    started = signature(app, "started", max_tokens=2).delay()
    cluster.wait("its start", lambda: started.id in active("pdbatch.generate"), 20)
    started.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        started.get(timeout=20)
    own = job_of(started.id)
    cluster.wait(
        "its end", lambda: cluster.store.jobs.states([own])[own] in TERMINAL_JOB_STATES, 20
    )
    assert cluster.store.jobs.get(own).state is JobState.CANCELLED

    task_id = "never-started"
    app.control.revoke(task_id, reply=True, timeout=3)
    late = signature(app, "late", max_tokens=2).apply_async(task_id=task_id)
    with pytest.raises(TaskRevokedError):
        late.get(timeout=20)

    cluster.start("decode-1")
    cluster.wait("the job's end", lambda: cluster.done(job) == 64)
    view = cluster.store.jobs.get(job)
    assert (view.counts.succeeded, view.counts.failed) == (48, 16)
    answer = signature(app, "works still", max_tokens=2).delay().get(timeout=30)
    assert answer["text"] == "xx"
    cluster.assert_idle()


def test_a_cancelled_job_leaves_the_workers(cluster: Cluster) -> None:
    cluster.start("reconciler", "prefill-1")
    job = cluster.submit(100, least_tokens=2)
    prefill = cluster.store.workers.list
    cluster.wait("pins", lambda: any(w.stats.get("pinned_requests") for w in prefill()))
    assert cluster.store.jobs.cancel(job) is JobState.CANCELLED
    cluster.assert_idle()


@both
def test_flower_sees_workers_and_shards(cluster: Cluster, settings: Settings) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    shown = replace(settings, **FAST, flower_port=port)  # type: ignore[arg-type]
    cluster.start("reconciler", "mixed-1")
    cluster.start("flower", settings=shown)

    def get(path: str) -> Any:
        try:
            with urllib.request.urlopen(base + path, timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return json.loads(text) if path.startswith("/api") else text

    cluster.wait("Flower", lambda: get("/"), 30)
    cluster.wait("the worker in Flower", lambda: get("/api/workers?refresh=1"), 30)
    job = cluster.submit(64)
    cluster.finish(job)
    tasks: list[dict[str, Any]] = []

    def ended() -> bool:
        tasks[:] = get("/api/tasks").values()
        return [task["state"] for task in tasks] == ["SUCCESS"] * 4

    cluster.wait("four ended tasks in Flower", ended, 30)
    assert {task["name"] for task in tasks} == {PREFILL_TASK}
    assert sorted(task["args"] for task in tasks) == [
        f"{job} shard {n} attempt 1" for n in range(4)
    ]
    workers: list[dict[str, Any]] = []

    def shown_by_role() -> bool:
        workers[:] = get("/api/workers?refresh=1").values()
        return [w.get("stats", {}).get("pool", {}).get("role") for w in workers] == ["mixed"]

    cluster.wait("the worker's role in Flower", shown_by_role, 30)
    assert get("/api/jobs")["jobs"][0]["id"] == job
    assert job in get("/")
