"""No hot statement reads a whole table."""

from __future__ import annotations

import pytest
from sqlalchemy import ClauseElement, create_engine
from sqlalchemy.dialects import sqlite

from pdbatch.store import holds, ledger, locks, results, shards
from pdbatch.store.database import parse_url

HOT: dict[str, ClauseElement] = {
    "lock shards": locks._SHARDS,
    "shards of requests": locks._SHARDS_OF,
    "unheld requests": locks._UNHELD,
    "end holds": ledger._END_HOLDS,
    "count": ledger._ADD_COUNTERS,
    "owners": holds._OWNERS,
    "shards for a live worker": locks._SHARDS_FOR,
    "priority for a live worker": locks._PRIORITY_FOR,
    "hand over": shards._HAND_OVER,
    "left to run": shards._LEFT_TO_RUN,
    "results in order": results._QUERY.where(results.RESULTS.c.id > 1).limit(9),
}


@pytest.mark.parametrize("name", HOT)
def test_hot_statements_use_indexes(sqlite_store_url: str, name: str) -> None:
    sql = str(HOT[name].compile(dialect=sqlite.dialect(), compile_kwargs={"render_postcompile": 1}))
    engine = create_engine(parse_url(sqlite_store_url))
    with engine.connect() as conn:
        plan = conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", (1,) * sql.count("?"))
        steps = [row[3] for row in plan]
    engine.dispose()
    assert [step for step in steps if step.startswith("SCAN") and "json_each" not in step] == []
