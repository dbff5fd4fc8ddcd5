"""`pdbatch db`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.group()
def db() -> None:
    """Look after the database's tables."""


@db.command()
@settings_options()
def upgrade(settings: Settings) -> None:
    """Make the tables, or bring them to this version's revision."""
    from pdbatch.store import upgrade as upgrade_store

    click.echo(upgrade_store(settings.database_url))


@db.command()
@settings_options()
def check(settings: Settings) -> None:
    """Print the revision; exit with 4 when the tables are missing or at another one."""
    from pdbatch.store import check as check_store

    click.echo(check_store(settings.database_url))
