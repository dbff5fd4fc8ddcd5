"""Workers: their lives, and what becomes of their work."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from pdbatch.ids import WorkerId
from pdbatch.states import AttemptState, ShardState
from pdbatch.store import ledger, locks
from pdbatch.store.database import Database
from pdbatch.store.models import HOLDS, REQUESTS, SHARDS, WORKERS
from pdbatch.store.rows import WorkerView, storable


class Workers:
    """`store.workers`.

    A life: `register`, `heartbeat` every few seconds, then `retire`, or `reap` by a
    reconciler. When it ends, in the same transaction, its holds end and what it answered for
    goes back to the queue: the shards that it had claimed, and those that were handed off to it. A
    shard that another live worker has claimed stays with that one, which finds out in
    `hand_off` what is left."""

    def __init__(self, database: Database, *, max_attempts: int) -> None:
        self._db = database
        self._max_attempts = max_attempts

    def register(
        self,
        name: str,
        host: str,
        role: str,
        model: str,
        device: str = "",
        info: Mapping[str, Any] | None = None,
    ) -> WorkerId:
        """A new life `<name>@<host>#<epoch>`, its epoch above all before it. A live predecessor
        of that name on that host is declared dead at once and its work orphaned."""

        def run(conn: Connection) -> WorkerId:
            named = (WORKERS.c.name == name, WORKERS.c.host == host)
            live = select(WORKERS.c.id).where(*named, WORKERS.c.state == "live")
            for predecessor in conn.execute(live.with_for_update()).scalars().all():
                self._end_life(conn, WorkerId(predecessor), "dead", failed=True)
            last = conn.execute(select(func.max(WORKERS.c.epoch)).where(*named)).scalar()
            now = self._db.dialect.now(conn)
            epoch = max(int(now), (last or 0) + 1)  # above those of a database that is no more
            worker = WorkerId(f"{name}@{host}#{epoch}")
            values = {
                "id": worker,
                "name": name,
                "host": host,
                "epoch": epoch,
                "role": role,
                "model": storable(model),
                "device": device,
                "state": "live",
                "info": dict(info or {}),
                "stats": {},
                "registered_at": now,
                "heartbeat_at": now,
            }
            conn.execute(insert(WORKERS).values(values))
            return worker

        return self._db.write(run)

    def heartbeat(self, worker: WorkerId, stats: Mapping[str, Any] | None = None) -> bool:
        """Notes that the worker lives. False: it was declared dead (fenced); it must drop all
        its work and register anew."""

        def run(conn: Connection) -> bool:
            values: dict[str, Any] = {"heartbeat_at": self._db.dialect.now(conn)}
            if stats is not None:
                values["stats"] = dict(stats)
            alive = (WORKERS.c.id == worker, WORKERS.c.state == "live")
            noted = update(WORKERS).where(*alive).values(values).returning(WORKERS.c.id)
            return conn.execute(noted).first() is not None

        return self._db.write(run)

    def retire(self, worker: WorkerId) -> None:
        """The worker leaves in order: its work is given back, and nobody's failure."""

        def run(conn: Connection) -> None:
            live = select(WORKERS.c.id).where(WORKERS.c.id == worker, WORKERS.c.state == "live")
            if conn.execute(live.with_for_update()).first() is not None:
                self._end_life(conn, worker, "retired", failed=False)

        self._db.write(run)

    def reap(self, ttl_s: float) -> builtins.list[WorkerId]:
        """Declares workers dead whose last heartbeat is older than `ttl_s`; returns them.

        Requests that they answered for count one retry more; those that were lost
        `max_attempts` times get a `batch_failed` row. Any number of reconcilers may call it."""
        late = self._db.read(lambda conn: self._late(conn, ttl_s))
        return [worker for worker in late if self._declare_dead(worker, ttl_s)]

    def forget(self, after_s: float) -> int:
        """Removes the rows of workers that ended longer ago than `after_s`; returns how many.
        Nothing refers to them: with a life end its holds and claims."""

        def run(conn: Connection) -> int:
            before = self._db.dialect.now(conn) - after_s
            ended = (WORKERS.c.state != "live", WORKERS.c.ended_at < before)
            return conn.execute(delete(WORKERS).where(*ended)).rowcount

        return self._db.write(run)

    def _late(self, conn: Connection, ttl_s: float) -> builtins.list[WorkerId]:
        before = self._db.dialect.now(conn) - ttl_s
        query = select(WORKERS.c.id).where(
            WORKERS.c.state == "live", WORKERS.c.heartbeat_at < before
        )
        return [WorkerId(id_) for id_ in conn.execute(query.order_by(WORKERS.c.id)).scalars()]

    def _declare_dead(self, worker: WorkerId, ttl_s: float) -> bool:
        def run(conn: Connection) -> bool:
            before = self._db.dialect.now(conn) - ttl_s
            query = select(WORKERS.c.id).where(
                WORKERS.c.id == worker,
                WORKERS.c.state == "live",
                WORKERS.c.heartbeat_at < before,
            )
            if conn.execute(query.with_for_update(skip_locked=True)).first() is None:
                return False  # it spoke up, or another reconciler is at it
            self._end_life(conn, worker, "dead", failed=True)
            return True

        return self._db.write(run)

    def _end_life(self, conn: Connection, worker: WorkerId, state: str, *, failed: bool) -> None:
        """Ends the life and orphans its work. The caller holds the worker's row alone, so
        that no hold and no claim in its name can come up meanwhile."""
        db = self._db
        ended = {"state": state, "ended_at": db.dialect.now(conn)}
        conn.execute(update(WORKERS).where(WORKERS.c.id == worker).values(ended))
        claimed, handed = self._shards_of(conn, worker)
        locks.lock_shards(conn, claimed | handed)
        mine = delete(HOLDS).where(HOLDS.c.worker_id == worker).returning(HOLDS.c.id)
        dropped = set(conn.execute(mine).scalars())
        if failed:
            lost = dropped | set(locks.unheld_requests(conn, claimed))
            ledger.count_loss(db, conn, lost, self._max_attempts)
        touched = claimed | set(locks.shards_of(conn, dropped).values())
        orphans = [
            shard
            for shard in locks.lock_shards(conn, touched).values()
            if shard.claimed_by == worker or shard.state is ShardState.HANDED_OFF
        ]
        ended_as = AttemptState.LOST if failed else AttemptState.GIVEN_BACK
        ledger.put_back(db, conn, orphans, ended_as)

    def _shards_of(self, conn: Connection, worker: WorkerId) -> tuple[set[int], set[int]]:
        """Shards that it claimed; shards of which it holds requests."""
        claimed = select(SHARDS.c.id).where(SHARDS.c.claimed_by == worker)
        held = (
            select(REQUESTS.c.shard_id)
            .join_from(HOLDS, REQUESTS, REQUESTS.c.id == HOLDS.c.id)
            .where(HOLDS.c.worker_id == worker)
        )
        return set(conn.execute(claimed).scalars()), set(conn.execute(held).scalars())

    def list(self, live_only: bool = True) -> builtins.list[WorkerView]:
        """Workers by name; the ended ones too, newest life first, where `live_only` is False."""
        claimed = _count_by(SHARDS.c.claimed_by, "num_shards")
        held = _count_by(HOLDS.c.worker_id, "num_holds")
        query = (
            select(
                WORKERS,
                func.coalesce(claimed.c.num_shards, 0).label("num_shards"),
                func.coalesce(held.c.num_holds, 0).label("num_holds"),
            )
            .outerjoin(claimed, claimed.c.worker == WORKERS.c.id)
            .outerjoin(held, held.c.worker == WORKERS.c.id)
            .order_by(WORKERS.c.name, WORKERS.c.host, WORKERS.c.epoch.desc())
        )
        if live_only:
            query = query.where(WORKERS.c.state == "live")
        return self._db.read(lambda conn: [_view(row) for row in conn.execute(query)])


def _count_by(worker: Any, name: str) -> Any:
    counted = select(worker.label("worker"), func.count().label(name))
    return counted.where(worker.is_not(None)).group_by(worker).subquery()


def _view(row: Row[Any]) -> WorkerView:
    return WorkerView(**row._mapping)
