"""The shards that this worker has claimed, and which of their requests have not left it yet.

A request leaves when its row is written, when a decode worker has taken it over, or when it
was cancelled. With the last one its shard is over, and whoever submitted it is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdbatch.engine.messages import EngineRequest
from pdbatch.ids import JobId, RequestKey, ShardIndex


@dataclass(slots=True, kw_only=True)
class OpenShard:
    """One claim."""

    job: JobId
    shard: ShardIndex
    attempt: int
    on_over: Callable[[OpenShard], None]
    left: dict[RequestKey, EngineRequest]
    """Requests that are still here, with what is needed to run them again."""
    num_failures: dict[RequestKey, int] = field(default_factory=dict)
    """Hand-offs of a request that failed."""


class OpenShards:
    """Safe among threads. `on_over` is called outside of the lock, once for each shard."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[RequestKey, OpenShard] = {}
        self._shards: dict[tuple[JobId, ShardIndex], OpenShard] = {}

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def num_requests(self) -> int:
        """Requests that have not left."""
        return len(self._of)

    def add(self, shard: OpenShard) -> None:
        """A fresh claim; an older one of the same shard is replaced (its claim was over)."""
        with self._lock:
            old = self._shards.pop((shard.job, shard.shard), None)
            for key in old.left if old else ():
                self._of.pop(key, None)
            self._shards[shard.job, shard.shard] = shard
            self._of.update(dict.fromkeys(shard.left, shard))
        if old:
            old.on_over(old)

    def leave(self, keys: Iterable[str]) -> None:
        """These requests are no longer ours; unknown ones are ignored."""
        over: list[OpenShard] = []
        with self._lock:
            for key in map(RequestKey, keys):
                shard = self._of.pop(key, None)
                if shard is None:
                    continue
                shard.left.pop(key, None)
                if not shard.left:
                    self._shards.pop((shard.job, shard.shard), None)
                    over.append(shard)
        for shard in over:
            shard.on_over(shard)

    def again(self, key: str) -> tuple[EngineRequest, int] | None:
        """The request for another try and how often it failed by now; None if it is not ours."""
        with self._lock:
            shard = self._of.get(RequestKey(key))
            if shard is None:
                return None
            failures = shard.num_failures.get(RequestKey(key), 0) + 1
            shard.num_failures[RequestKey(key)] = failures
            return shard.left[RequestKey(key)], failures

    def find(self, job: str, shard: int) -> OpenShard | None:
        """The open shard of that name."""
        with self._lock:
            return self._shards.get((JobId(job), ShardIndex(shard)))

    def jobs(self) -> set[JobId]:
        """Jobs with an open shard."""
        with self._lock:
            return {job for job, _ in self._shards}

    def of_job(self, job: JobId) -> list[OpenShard]:
        """Its open shards."""
        with self._lock:
            return [shard for (of, _), shard in self._shards.items() if of == job]

    def keys(self) -> list[RequestKey]:
        """Requests that have not left."""
        with self._lock:
            return list(self._of)

    def clear(self) -> list[OpenShard]:
        """Forget all; returns them. `on_over` is not called."""
        with self._lock:
            shards = list(self._shards.values())
            self._shards.clear()
            self._of.clear()
            return shards
