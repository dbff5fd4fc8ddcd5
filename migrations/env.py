"""Alembic's entry: runs the migrations on the connection that `pdbatch.store.schema` hands over.

From a shell, for people who write migrations: `alembic -c migrations/alembic.ini revision
--autogenerate -m "..."` with PDBATCH_DATABASE_URL set.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, create_engine

from pdbatch.store.models import Base


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with create_engine(os.environ["PDBATCH_DATABASE_URL"]).begin() as own:
        _run(own)
