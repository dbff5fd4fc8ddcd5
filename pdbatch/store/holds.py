"""Holds: which decode worker answers for a request."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, literal, select, union_all

from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.states import AttemptState, ShardState
from pdbatch.store import ledger, locks
from pdbatch.store.database import Database
from pdbatch.store.idsets import is_in
from pdbatch.store.keys import row_id
from pdbatch.store.models import HOLDS, RESULTS
from pdbatch.store.rows import Key

DONE = "done"
"""Stands for the owner of a request that has its row."""
_OWNERS = union_all(
    select(HOLDS.c.id, HOLDS.c.worker_id).where(is_in(HOLDS.c.id, "ids")),
    select(RESULTS.c.id, literal(DONE)).where(is_in(RESULTS.c.id, "ids")),
)


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

        def run(conn: Connection) -> set[Key]:
            wanted = self._by_id(conn, keys)
            shards = locks.shards_for(conn, worker, wanted) if wanted else {}
            if not shards:
                return set()
            locks.lock_shards(conn, set(shards.values()))
            owners = _owners(conn, wanted)
            free = [id_ for id_ in sorted(shards) if id_ not in owners]
            if free:
                self._db.dialect.insert_holds(conn, free, worker)
            mine = [id_ for id_, owner in owners.items() if owner == worker]
            return {wanted[id_] for id_ in (*free, *mine)}

        return self._db.write(run)

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

        def run(conn: Connection) -> set[Key]:
            wanted = self._by_id(conn, keys)
            shards = locks.shards_of(conn, wanted)
            locks.lock_shards(conn, set(shards.values()))
            mine = delete(HOLDS).where(is_in(HOLDS.c.id, wanted), HOLDS.c.worker_id == worker)
            dropped = list(conn.execute(mine.returning(HOLDS.c.id)).scalars())
            if failed:
                ledger.count_loss(self._db, conn, dropped, self._max_attempts)
            locked = locks.lock_shards(conn, {shards[id_] for id_ in dropped})
            orphans = [row for row in locked.values() if row.state is ShardState.HANDED_OFF]
            ended_as = AttemptState.LOST if failed else AttemptState.GIVEN_BACK
            ledger.put_back(self._db, conn, orphans, ended_as)
            return {wanted[id_] for id_ in dropped}

        return self._db.write(run)

    def owners(self, keys: Collection[tuple[JobId, RequestIndex | int]]) -> dict[Key, str | None]:
        """For each key `"done"` (it has a row), the WorkerId of its live holder, or None."""

        def run(conn: Connection) -> dict[Key, str | None]:
            wanted = self._by_id(conn, keys)
            owners = _owners(conn, wanted)
            return {key: owners.get(id_) for id_, key in wanted.items()}

        return self._db.read(run)

    def _by_id(
        self, conn: Connection, keys: Collection[tuple[JobId, RequestIndex | int]]
    ) -> dict[int, Key]:
        numbers = {job: self._db.job_no(conn, job) for job in {job for job, _ in keys}}
        return {row_id(numbers[job], index): (job, RequestIndex(index)) for job, index in keys}


def _owners(conn: Connection, ids: Collection[int]) -> dict[int, str]:
    """DONE or the holder of each that has one; in one statement, so a hold that ends in a row
    shows as the one or the other."""
    return {row[0]: row[1] for row in conn.execute(_OWNERS, {"ids": ids})}
