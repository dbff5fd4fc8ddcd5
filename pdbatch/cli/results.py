"""`pdbatch results` and `pdbatch errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings

_output = click.option("--output", "-o", default="-", metavar="OUT", help="A file; - is stdout.")
_follow = click.option(
    "--follow", is_flag=True, help="Go on, in order, until the job has ended, as rows come."
)


@click.command()
@click.argument("job")
@_output
@_follow
@settings_options()
def results(job: str, output: str, follow: bool, settings: Settings) -> None:
    """Write the results of JOB that are ready, as JSONL in the order of the input.

    Works while the job runs too. Requests that failed are in `pdbatch errors`.
    """
    _write(job, output, follow, settings, errors=False)


@click.command()
@click.argument("job")
@_output
@_follow
@settings_options()
def errors(job: str, output: str, follow: bool, settings: Settings) -> None:
    """Write the requests of JOB that were rejected or failed, as JSONL in the input's order."""
    _write(job, output, follow, settings, errors=True)


def _write(job: str, output: str, follow: bool, settings: Settings, *, errors: bool) -> None:
    from pdbatch.cli.files import check_output, write_lines
    from pdbatch.client import Client

    check_output(output)
    with Client(settings) as client:
        handle = client.job(job)
        rows = handle.errors(follow=follow) if errors else handle.results(follow=follow)
        number = write_lines(output, rows, flush=follow)
    if output != "-":
        click.echo(f"{number} lines in {output}", err=True)
