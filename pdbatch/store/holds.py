"""Holds: which decode worker answers for a request."""

from __future__ import annotations

from collections.abc import Collection

from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.store.database import Database
from pdbatch.store.rows import Key


class Holds:
    """`store.holds`. A hold begins with `take` and ends with the request's row, with
    `drop`, or with its worker's life. A request has at most one."""

    def __init__(self, database: Database, *, max_attempts: int) -> None:
        self._db = database
        self._max_attempts = max_attempts

    def take(
        self, worker: WorkerId, keys: Collection[tuple[JobId, RequestIndex | int]]
    ) -> set[Key]:
        """The keys that `worker` now holds (those that it held before included). Refused: keys
        with a row, keys that another live worker holds, all keys where the worker is not live."""
        raise NotImplementedError

    def drop(
        self,
        worker: WorkerId,
        keys: Collection[tuple[JobId, RequestIndex | int]],
        failed: bool = False,
    ) -> set[Key]:
        """Ends holds of `worker` without a row; returns the keys whose hold it had.

        The requests are the claimer's again where their shard is claimed (it finds out in
        `hand_off`), else the shard is PENDING again with the next attempt. `failed`: counts
        against the requests."""
        raise NotImplementedError

    def owners(self, keys: Collection[tuple[JobId, RequestIndex | int]]) -> dict[Key, str | None]:
        """For each key `"done"` (it has a row), the WorkerId of its live holder, or None."""
        raise NotImplementedError
