"""The commands that the Procfile names: each becomes its service by exec."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@settings_options("broker_url")
def redis(settings: Settings) -> None:
    """Be the embedded Redis of this home; idle where the settings name a broker."""
    from pdbatch.errors import QueueError
    from pdbatch.local.redis import answers, server_argv

    if settings.broker_url:
        click.echo("the settings name a broker; no embedded Redis is needed", err=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        return
    if answers(settings.embedded_broker_url):
        raise QueueError(
            f"an embedded Redis runs already for {settings.home}",
            remedy="Use it, or stop the other `pdbatch up`.",
        )
    argv = server_argv(settings.home / "run" / "redis.sock")
    os.execv(argv[0], argv)


@click.command()
@settings_options("broker_url")
def reconciler(settings: Settings) -> None:
    """Be the feeder and reconciler."""
    from pdbatch.local.processes import reconciler_argv

    _become(reconciler_argv(), settings)


@click.command()
@settings_options("broker_url")
def flower(settings: Settings) -> None:
    """Be Flower, on the loopback, with pdbatch's page of jobs."""
    from pdbatch.local.processes import flower_argv

    _become(flower_argv(), settings)


def _become(argv: tuple[str, ...], settings: Settings) -> None:
    from pdbatch.local.database import prepare
    from pdbatch.local.processes import child_env, with_broker
    from pdbatch.local.redis import wait_for_redis

    settings = with_broker(settings)
    wait_for_redis(settings.broker_url or "")
    prepare(settings)
    os.execve(argv[0], argv, child_env(settings))
