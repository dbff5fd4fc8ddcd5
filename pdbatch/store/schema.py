"""The database's revision: checked when a store is opened, raised by `pdbatch db upgrade`."""

from __future__ import annotations

from pdbatch.store.database import Database


def upgrade(url: str) -> str:
    """Makes or upgrades the tables; returns the revision. Does nothing when it is up to date.
    Makes the folder of a SQLite file. Raises StoreError when the database cannot be reached."""
    raise NotImplementedError


def check(url: str, *, database: Database | None = None) -> str:
    """The revision of the database. Raises StoreError (remedy `pdbatch db upgrade`) when the
    database or its tables are missing, or when it is at another revision."""
    raise NotImplementedError
