"""A local cluster with a real Redis and workers that are played."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from pdbatch.config import Settings
from pdbatch.errors import EngineError
from pdbatch.local import cluster as cluster_module
from pdbatch.local.cluster import LocalCluster, plan_workers
from pdbatch.local.database import is_embedded, open_store
from pdbatch.local.redis import answers

FOREVER = (sys.executable, "-c", "import signal; signal.pause()")
BROKEN = (sys.executable, "-c", "raise SystemExit('pdbatch: the model m cannot be loaded')")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(cluster_module, "reconciler_argv", lambda: FOREVER)
    return Settings(home=tmp_path / "home")


def test_all_start_and_all_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "worker_argv", lambda _: FOREVER)
    plans = plan_workers({"m"}, prefill=1, decode=1)
    with LocalCluster(settings, plans) as cluster:
        names = cluster.supervisor.names()
        assert names == ["redis", "reconciler", plans[0].name, plans[1].name]
        pids = [cluster.supervisor.pid(name) for name in names]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        broker = cluster.settings.broker_url or ""
        assert answers(broker)
        assert cluster.settings.worker_threads
        assert open_store(settings).workers.list() == []
        cluster.step(0.01)
        assert not cluster.all_registered
        cluster.health.note_registered(plan.name for plan in plans)
        assert cluster.all_registered
    assert not answers(broker)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not Path(broker.removeprefix("redis+socket://")).parent.exists()
    assert {path.name for path in settings.logs.iterdir()} == {
        "redis.log",
        "reconciler.log",
        "prefill-1.log",
        "decode-1.log",
    }


def test_workers_that_cannot_start_end_it_with_their_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "worker_argv", lambda _: BROKEN)
    plans = plan_workers({"m"}, prefill=1, decode=1)
    deadline = time.monotonic() + 60
    with (
        pytest.raises(EngineError, match="cannot run: the model m cannot be loaded") as caught,
        LocalCluster(settings, plans) as cluster,
    ):
        while time.monotonic() < deadline:
            cluster.step(1.0)
    assert "-1.log" in (caught.value.remedy or "")


def test_a_worker_that_was_seen_alive_is_started_again_and_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "worker_argv", lambda _: BROKEN)
    plans = plan_workers({"m"}, prefill=1, decode=0)
    deadline = time.monotonic() + 60
    with LocalCluster(settings, plans) as cluster:
        cluster.health.note_registered([plans[0].name])
        while cluster.supervisor.num_exits(plans[0].name) < 4:
            assert time.monotonic() < deadline
            cluster.step(1.0)


def test_only_the_default_database_is_embedded(tmp_path: Path) -> None:
    assert is_embedded(Settings(home=tmp_path))
    assert not is_embedded(Settings(home=tmp_path, database_url="sqlite:///elsewhere.db"))
    assert not is_embedded(Settings(home=tmp_path, database_url="postgresql+psycopg://h/d"))
