"""`pdbatch submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@click.argument("input", metavar="IN")
@click.option("--wait", is_flag=True, help="Wait until the job has ended.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Wait no longer than this.")
@click.option("--priority", type=int, default=0, help="Below 0 runs first, above 0 last.")
@click.option("--weight", type=click.IntRange(1), default=1, help="Share beside other jobs.")
@settings_options("shard_size")
@click.option("--model", metavar="M", help="Serves the whole job; else each line's own model.")
def submit(
    input: str,
    wait: bool,
    timeout_s: float | None,
    priority: int,
    weight: int,
    model: str | None,
    settings: Settings,
) -> None:
    """Put the requests of IN (JSONL; - is stdin) into the queue and print the job's id, alone.

    Progress goes to stderr. The job runs as soon as workers have room; none need be up now.
    """
    from pdbatch.cli.exits import of_job
    from pdbatch.cli.files import open_input
    from pdbatch.cli.notes import note_missing_workers
    from pdbatch.cli.progress import open_progress
    from pdbatch.client import Client

    with Client(settings) as client, open_input(input) as source, open_progress() as progress:
        job = client.submit(
            source,
            model=model,
            priority=priority,
            weight=weight,
            input_name=input,
            on_progress=progress.ingest,
        )
        click.echo(job.id)
        note_missing_workers(client, job.models)
        view = job.wait(timeout_s, progress.job) if wait else None
    if view:
        click.get_current_context().exit(of_job(view))
