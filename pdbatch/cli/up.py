"""`pdbatch up`: the Procfile's processes in the foreground."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings
    from pdbatch.local.supervisor import Exit


@click.command()
@click.option("--procfile", metavar="FILE", help="Another Procfile than the one here.")
@click.option("--stop-timeout", "stop_s", type=float, default=30.0, help="Seconds to stop (30).")
@settings_options(
    "model",
    "device",
    "tensor_parallel_size",
    "dtype",
    "quantization",
    "broker_url",
    "kv_transport",
    "kv_checksum",
)
def up(procfile: str | None, stop_s: float, settings: Settings) -> None:
    """Keep the processes of the Procfile running until Ctrl-C or SIGTERM.

    One that ends is started again, after 0.5 s at first and up to 30 s later on.
    """
    from dataclasses import replace

    from pdbatch.local.database import prepare
    from pdbatch.local.processes import child_env, threads_each
    from pdbatch.local.procfile import procfile_specs, read_procfile
    from pdbatch.local.supervisor import Supervisor
    from pdbatch.queues import check_redis

    text, where = _procfile(procfile)
    commands = read_procfile(text, where)
    workers = sum("pdbatch worker" in command for command in commands.values())
    shared = replace(settings, worker_threads=settings.worker_threads or threads_each(workers))
    specs = procfile_specs(commands, child_env(shared))
    if settings.broker_url:
        check_redis(settings.broker_url)
    prepare(settings)
    supervisor = Supervisor(specs, on_line=_print_line, on_exit=_print_exit)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.request_stop())
    try:
        supervisor.run()
    finally:
        click.echo("stopping", err=True)
        killed = supervisor.stop(stop_s)
        if killed:
            click.echo(f"killed after {stop_s:g} s: {', '.join(killed)}", err=True)


def _procfile(name: str | None) -> tuple[str, str]:
    from pdbatch.errors import InputError
    from pdbatch.local.procfile import DEFAULT_PROCFILE

    path = Path(name or "Procfile")
    if name is None and not path.exists():
        return DEFAULT_PROCFILE, "the built-in Procfile"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _print_line(name: str, line: str) -> None:
    click.echo(f"{name:<10} | {line}")


def _print_exit(exit_: Exit) -> None:
    how = f"signal {-exit_.code}" if exit_.code < 0 else f"exit code {exit_.code}"
    again = f"starts again in {exit_.restart_in_s:g} s"
    click.echo(f"{exit_.name:<10} | ended by {how} after {exit_.lived_s:.1f} s; {again}", err=True)
