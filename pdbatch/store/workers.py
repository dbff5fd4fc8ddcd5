"""Workers: their lives, and what becomes of their work."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from pdbatch.ids import WorkerId
from pdbatch.store.database import Database
from pdbatch.store.rows import WorkerView


class Workers:
    """`store.workers`.

    A life: `register`, `heartbeat` every few seconds, then `retire`, or `reap` by a
    reconciler. When it ends, in the same transaction, its holds end and what it answered for
    goes back to the queue."""

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
        raise NotImplementedError

    def heartbeat(self, worker: WorkerId, stats: Mapping[str, Any] | None = None) -> bool:
        """Notes that the worker lives. False: it was declared dead (fenced); it must drop all
        its work and register anew."""
        raise NotImplementedError

    def retire(self, worker: WorkerId) -> None:
        """The worker leaves in order: its work is given back, and nobody's failure."""
        raise NotImplementedError

    def reap(self, ttl_s: float) -> builtins.list[WorkerId]:
        """Declares workers dead whose last heartbeat is older than `ttl_s`; returns them.

        Requests that they answered for count one retry more; those that were lost
        `max_attempts` times get a `batch_failed` row. Any number of reconcilers may call it."""
        raise NotImplementedError

    def list(self, live_only: bool = True) -> builtins.list[WorkerView]:
        """Workers by name; the ended ones too, newest life first, where `live_only` is False."""
        raise NotImplementedError
