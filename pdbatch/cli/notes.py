"""What a person should know beside the progress, on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from pdbatch.states import JobState

if TYPE_CHECKING:
    from pdbatch.client import Client


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


def note_missing_workers(client: Client, models: Iterable[str]) -> None:
    """Says which models no live worker serves."""
    served = {worker.model for worker in client.workers()}
    for model in sorted(set(models) - served):
        note(f"note: no worker serves {model} now; start one with `pdbatch worker` or `pdbatch up`")


def note_other_jobs(client: Client, job: str) -> None:
    """Says which unfinished jobs will share the workers."""
    for view in client.jobs(limit=20, states={JobState.IN_PROGRESS}):
        if view.id != job:
            left = view.counts.total - view.counts.done
            note(f"note: {view.id} ({left} requests left) shares the workers; `pdbatch cancel` it?")
