"""The store of this installation: the embedded SQLite file is kept up to date by itself."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdbatch.config import Settings
    from pdbatch.store import Store


def open_store(settings: Settings) -> Store:
    """The store, its tables made or upgraded first where it is the embedded one.

    Raises StoreError: a database that somebody named is upgraded by `pdbatch db upgrade` alone.
    """
    from pdbatch.store import Store

    prepare(settings)
    return Store.open(settings.database_url, max_attempts=settings.max_attempts)


def prepare(settings: Settings) -> None:
    """Makes or upgrades the embedded SQLite database; leaves every other alone."""
    from pdbatch.errors import StoreError
    from pdbatch.store import check, upgrade

    if not is_embedded(settings):
        return
    settings.home.mkdir(parents=True, exist_ok=True)
    with _locked(settings.home / ".upgrade.lock"):
        try:
            check(settings.database_url)
        except StoreError:
            upgrade(settings.database_url)


def is_embedded(settings: Settings) -> bool:
    """Whether the database is the default one, `<home>/pdbatch.db`."""
    return settings.database_url == f"sqlite:///{settings.home / 'pdbatch.db'}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
