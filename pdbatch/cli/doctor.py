"""`pdbatch doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@click.option(
    "--gpu-timeout",
    "limit_s",
    type=click.FloatRange(0, min_open=True),
    default=90.0,
    help="Seconds that CUDA has to answer (90).",
)
@json_option
@settings_options("model", "device", "broker_url", "kv_transport")
def doctor(limit_s: float, as_json: bool, settings: Settings) -> None:
    """Examine this machine: GPUs, links, NICs, services, and how KV would move.

    Each finding comes with what to do about it. Exits with 1 when something that is needed with
    these settings does not work. Starts and changes nothing.
    """
    import os

    from pdbatch.cli.jsonout import print_json
    from pdbatch.doctor import examine

    os.environ.setdefault("PGCONNECT_TIMEOUT", "5")  # a PostgreSQL that is away shall not hold us
    report = examine(settings, limit_s=limit_s)
    if as_json:
        import msgspec

        print_json({"ok": report.ok, **msgspec.to_builtins(report, str_keys=True)})
    else:
        from pdbatch.doctor.text import print_report

        print_report(report)
    raise click.exceptions.Exit(0 if report.ok else 1)
