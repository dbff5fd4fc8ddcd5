"""The truth: jobs, shards, requests, results, attempts, holds and workers in SQL.

    store = Store.open(url)            store.jobs  .ingest(...)  .shards  .holds  .results  .workers

Who answers for a request that has no terminal row: the worker in its hold, else the worker that
claimed its shard, else the queue. Every change of that happens under the lock of the shard's row
(on SQLite under the one write lock), so that each request ends in exactly one row and the counters
of a shard always equal its rows. See `pdbatch.store.locks` for their order.
"""

from __future__ import annotations

from pdbatch.store.facade import Store
from pdbatch.store.rows import (
    ClaimedRequest,
    ClaimedShard,
    Counts,
    IngestRow,
    JobView,
    Key,
    NewJob,
    QueueDepth,
    ResultRow,
    ShardMessage,
    StoredResult,
    TokenCounts,
    WorkerView,
)
from pdbatch.store.schema import check, upgrade

__all__ = [
    "ClaimedRequest",
    "ClaimedShard",
    "Counts",
    "IngestRow",
    "JobView",
    "Key",
    "NewJob",
    "QueueDepth",
    "ResultRow",
    "ShardMessage",
    "Store",
    "StoredResult",
    "TokenCounts",
    "WorkerView",
    "check",
    "upgrade",
]
