"""The commands of pdbatch's processes: what `run`, `up`, `worker` and a Procfile start.

Nothing here imports the processes' own code (`tasks`): they are named, not called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pdbatch.config import Settings
from pdbatch.local.child import ProcessSpec
from pdbatch.local.redis import server_argv
from pdbatch.queues import GENERATE_QUEUE, canonical_model, queue_names

POOL = "tasks.pool:EnginePool"
LEAST_SHARDS = 8
"""Shards that a worker works on at once, where nothing is set; more once its engine is known."""


def child_env(settings: Settings, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process: ours, and the settings complete."""
    return {**(os.environ if env is None else env), **settings.to_env()}


def redis_process(socket_path: Path, log: Path | None = None) -> ProcessSpec:
    """The embedded Redis at `socket_path`."""
    argv = server_argv(socket_path)
    return ProcessSpec(name="redis", argv=argv, env=os.environ, log=log, stops_last=True)


def reconciler_argv() -> tuple[str, ...]:
    """The feeder and reconciler."""
    return sys.executable, "-m", "tasks", "reconciler"


def flower_argv() -> tuple[str, ...]:
    """Flower with pdbatch's page, on the loopback."""
    return sys.executable, "-m", "tasks", "flower"


def worker_name(settings: Settings) -> str:
    """The worker's name: as set, or its role and this process's id."""
    return settings.worker_name or f"{settings.role}-{os.getpid()}"


def worker_queues(role: str, model: str, name: str) -> list[str]:
    """What a worker listens to: a decode worker takes hand-offs, not messages, and has a queue
    of its own that nobody sends to, because Celery wants one."""
    if role == "decode":
        return [f"pdbatch.control.{name}"]
    return [*queue_names(canonical_model(model)), GENERATE_QUEUE]


def worker_argv(settings: Settings) -> tuple[str, ...]:
    """The Celery worker of these settings (role, model, name)."""
    name = worker_name(settings)
    options = (
        ("--pool", "custom"),
        ("--queues", ",".join(worker_queues(settings.role, settings.model, name))),
        ("--hostname", f"{name}@%h"),
        ("--concurrency", str(settings.worker_shards or LEAST_SHARDS)),
        ("--loglevel", settings.log_level),
    )
    celery = (sys.executable, "-m", "celery", "-A", "tasks", "worker", "--task-events")
    return *celery, *(part for option in options for part in option)


def worker_env(settings: Settings) -> dict[str, str]:
    """The environment of that worker, in which its settings and our pool stand."""
    named = replace(
        settings,
        worker_name=worker_name(settings),
        model=canonical_model(settings.model),
    )
    return child_env(named) | {"CELERY_CUSTOM_WORKER_POOL": POOL}


def with_broker(settings: Settings) -> Settings:
    """The settings with a broker: the one that is named, else the embedded one of `up`."""
    if settings.broker_url:
        return settings
    return replace(settings, broker_url=settings.embedded_broker_url)


def threads_each(workers: int) -> int:
    """torch's threads for each of so many workers: the processor's cores, shared out."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))
