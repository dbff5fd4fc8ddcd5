"""`pdbatch status` and `pdbatch cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@click.argument("job", required=False)
@click.option("--limit", type=click.IntRange(1), default=20, help="Without JOB: so many jobs.")
@json_option
@settings_options()
def status(job: str | None, limit: int, as_json: bool, settings: Settings) -> None:
    """Show the state, counts, tokens and times of JOB; without JOB, the latest jobs."""
    from pdbatch.cli.display import job_document, job_lines, jobs_lines
    from pdbatch.cli.jsonout import print_json
    from pdbatch.client import Client

    with Client(settings) as client:
        views = [client.status(job)] if job else client.jobs(limit)
    if as_json:
        documents = [job_document(view) for view in views]
        print_json(documents[0] if job else documents)
    else:
        click.echo("\n".join(job_lines(views[0]) if job else jobs_lines(views)))


@click.command()
@click.argument("job")
@settings_options()
def cancel(job: str, settings: Settings) -> None:
    """End JOB: requests without a result get an error row; ready results are kept."""
    from pdbatch.client import Client

    with Client(settings) as client:
        state = client.cancel(job)
    click.echo(f"{job} is {state}", err=True)
