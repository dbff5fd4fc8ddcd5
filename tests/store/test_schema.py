"""The database: revisions, settings, lost connections."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from pdbatch.errors import ConfigError, StoreError
from pdbatch.store import NewJob, Store, check, upgrade
from pdbatch.store.database import Database, parse_url
from pdbatch.store.models import REVISION, Base
from pdbatch.store.schema import alembic_config

from .books import execute, make_job


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/er/pdbatch.db"
    url = request.getfixturevalue("pg_url")
    assert isinstance(url, str)
    return url


def _revisions() -> list[str]:
    with create_engine("sqlite://").connect() as conn:
        script = ScriptDirectory.from_config(alembic_config(conn))
    return [revision.revision for revision in reversed(list(script.walk_revisions()))]


def test_the_code_needs_the_newest_revision() -> None:
    assert _revisions()[-1] == REVISION


@pytest.mark.parametrize("start", [None, *_revisions()])
def test_upgrade_from_every_revision_gives_the_models(empty_url: str, start: str | None) -> None:
    if start is not None:
        assert upgrade(empty_url, start) == start
    assert upgrade(empty_url) == REVISION
    assert upgrade(empty_url) == REVISION
    assert check(empty_url) == REVISION
    engine = create_engine(parse_url(empty_url))
    with engine.connect() as conn:
        context = MigrationContext.configure(conn, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        expected = {(t.name, i.name) for t in Base.metadata.tables.values() for i in t.indexes}
        found = {
            (table, index["name"])
            for table in Base.metadata.tables
            for index in inspect(conn).get_indexes(table)
            if not index.get("duplicates_constraint")
        }
        assert expected <= found
    engine.dispose()


def test_several_upgrades_at_once_make_the_tables_once(empty_url: str) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(upgrade(empty_url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [REVISION] * 3


def test_a_database_without_tables_or_of_another_revision_is_refused(empty_url: str) -> None:
    for _ in range(2):  # a refusal makes no file
        with pytest.raises(StoreError) as missing:
            Store.open(empty_url)
        assert missing.value.remedy == "run `pdbatch db upgrade`"
    upgrade(empty_url)
    execute(empty_url, "UPDATE alembic_version SET version_num = 'later'")
    with pytest.raises(StoreError, match="at revision later, this pdbatch needs"):
        Store.open(empty_url)
    with pytest.raises(StoreError, match="later"):
        upgrade(empty_url)


def test_other_urls_are_refused_with_a_remedy() -> None:
    for url in ("mysql://x/y", "sqlite://", "sqlite:///:memory:", "nonsense"):
        with pytest.raises(ConfigError, match="database_url"):
            Database(url)
    for url in ("postgres://u:secret@h/d", "postgresql://u:secret@h/d"):
        shown = Database(url).shown_url
        assert shown == "postgresql+psycopg://u:***@h/d"


def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 100)
    with pytest.raises(StoreError, match="not a database"):
        Store.open(f"sqlite:///{path}")


def test_a_server_that_is_away_is_a_store_error() -> None:
    with pytest.raises(StoreError) as away:
        Store.open("postgresql://nobody:secret@127.0.0.1:1/none?connect_timeout=2")
    assert "secret" not in str(away.value)
    assert away.value.remedy == "see that the database runs and can be reached"


def test_sqlite_has_its_settings(sqlite_store_url: str) -> None:
    database = Database(sqlite_store_url)

    def pragmas(conn: object) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "page_size", "busy_timeout")
        return [conn.exec_driver_sql(f"PRAGMA {n}").scalar() for n in names]  # type: ignore

    assert database.read(pragmas) == ["wal", 1, 1, 8192, 30000]
    database.close()


@pytest.mark.postgres
def test_the_store_survives_dropped_connections(pg_store_url: str) -> None:
    with Store.open(pg_store_url) as store:
        job = make_job(store)
        cut = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        execute(pg_store_url, cut)
        assert store.jobs.get(job).counts.total == 8
        execute(pg_store_url, cut)
        assert store.jobs.create(NewJob()) != job


@pytest.mark.postgres
def test_a_transaction_whose_connection_drops_runs_again(pg_store_url: str) -> None:
    database = Database(pg_store_url)
    tries: list[int] = []

    def run(conn: object) -> int:
        tries.append(1)
        if len(tries) == 1:
            pid = conn.exec_driver_sql("SELECT pg_backend_pid()").scalar()  # type: ignore
            execute(pg_store_url, "SELECT pg_terminate_backend(:pid, 5000)", pid=pid)
        return int(conn.execute(text("SELECT 7")).scalar())  # type: ignore

    assert database.write(run) == 7
    assert len(tries) == 2
    database.close()


def test_a_store_that_stays_locked_gives_up_with_an_error(
    sqlite_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbatch.store.dialects.BUSY_TIMEOUT_S", 0.01)
    blocker = Database(sqlite_store_url)
    with blocker.engine.begin(), Store.open(sqlite_store_url, retry_s=0.05) as store:
        assert store.jobs.list() == []  # readers are not in the way
        with pytest.raises(StoreError, match="locked") as busy:
            store.jobs.create(NewJob())
        assert busy.value.remedy is not None
    blocker.close()


def test_opening_is_one_short_query_without_alembic(sqlite_store_url: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pdbatch.store import Store; Store.open(sys.argv[1]).close();"
        "print([m for m in ('alembic', 'mako', 'psycopg', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sqlite_store_url],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout.strip() == "[]"
