"""The database's revision: checked when a store is opened, raised by `pdbatch db upgrade`.

The migrations are the installed package `migrations`; Alembic is loaded by `upgrade` alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError

from pdbatch.errors import StoreError
from pdbatch.store.database import Database
from pdbatch.store.dialects import Sqlite
from pdbatch.store.models import REVISION

if TYPE_CHECKING:
    from alembic.config import Config

_REMEDY = "run `pdbatch db upgrade`"


def upgrade(url: str, revision: str = "head") -> str:
    """Makes or upgrades the tables; returns the revision. Does nothing when it is up to date.

    Makes the folder of a SQLite file. Several at once are safe: the others wait.
    Raises StoreError when the database cannot be reached or is newer than this pdbatch.
    """
    from alembic import command
    from alembic.util import CommandError

    database = Database(url)
    try:
        if isinstance(database.dialect, Sqlite):
            database.dialect.path.parent.mkdir(parents=True, exist_ok=True)

        def run(conn: Connection) -> str:
            if conn.dialect.name == "postgresql":
                conn.exec_driver_sql("SELECT pg_advisory_xact_lock(7267204381)")
            command.upgrade(alembic_config(conn), revision)
            return _current(conn) or ""

        return database.write(run)
    except CommandError as error:
        raise StoreError(
            f"{database.shown_url}: {error}", remedy="install the pdbatch that made this database"
        ) from error
    finally:
        database.close()


def check(url: str, *, database: Database | None = None) -> str:
    """The revision of the database. Raises StoreError (remedy `pdbatch db upgrade`) when the
    database or its tables are missing, or when it is at another revision."""
    opened = database or Database(url, retry_s=0.0)
    try:
        if isinstance(opened.dialect, Sqlite) and not opened.dialect.path.is_file():
            raise StoreError(f"there is no database {opened.dialect.path}", remedy=_REMEDY)
        found = opened.read(_current, retry=False)
        if found is None:
            raise StoreError(f"{opened.shown_url} has no tables of pdbatch", remedy=_REMEDY)
        if found != REVISION:
            raise StoreError(
                f"{opened.shown_url} is at revision {found}, this pdbatch needs {REVISION}",
                remedy=_REMEDY,
            )
        return found
    finally:
        if database is None:
            opened.close()


def alembic_config(conn: Connection) -> Config:
    """Alembic's settings for the package `migrations` over an open connection."""
    from alembic.config import Config

    package = find_spec("migrations")
    if package is None or not package.submodule_search_locations:
        raise StoreError("the package `migrations` is missing", remedy="install pdbatch again")
    config = Config()
    config.set_main_option("script_location", package.submodule_search_locations[0])
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    return config


def _current(conn: Connection) -> str | None:
    if conn.dialect.name == "sqlite":
        there = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    else:
        there = "SELECT 1 WHERE to_regclass('alembic_version') IS NOT NULL"
    try:
        if conn.exec_driver_sql(there).first() is None:
            return None
        found = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    except DatabaseError as error:
        if "not a database" in str(error.orig):
            raise StoreError(f"no SQLite database: {error.orig}") from error
        raise
    return str(found) if found is not None else None
