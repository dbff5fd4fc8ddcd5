"""`pdbatch worker`: becomes a Celery worker with our pool, by exec."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import ENGINE_OPTIONS, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@click.option("--name", metavar="NAME", help="Unique in the cluster (role and process id).")
@click.option("--concurrency", type=click.IntRange(1), help="Shards worked on at once.")
@settings_options(
    "role",
    "model",
    "device",
    "tensor_parallel_size",
    "dtype",
    "quantization",
    "broker_url",
    "kv_transport",
    "kv_checksum",
    *ENGINE_OPTIONS,
)
def worker(name: str | None, concurrency: int | None, settings: Settings) -> None:
    """Be one worker, on one device or several, until SIGTERM (which finishes what runs).

    The same as `celery -A tasks worker` with the environment that is set here.
    """
    from dataclasses import replace

    from pdbatch.local.database import prepare
    from pdbatch.local.processes import with_broker, worker_argv, worker_env
    from pdbatch.local.redis import wait_for_redis

    settings = with_broker(
        replace(
            settings,
            worker_name=name or settings.worker_name,
            worker_shards=concurrency or settings.worker_shards,
        )
    )
    wait_for_redis(settings.broker_url or "")
    prepare(settings)
    argv = worker_argv(settings)
    os.execve(argv[0], argv, worker_env(settings))
