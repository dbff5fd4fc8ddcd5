"""One worker's lives in the database: registered, signs of life, fenced, retired.

A refused sign of life means that the worker was declared dead and its work given to others (it was
stopped, or cut off, for longer than its time to live). It drops everything and begins a new life,
with a new epoch, so that nothing it offered before can be used.

Who takes work in the worker's name holds `taking` from the reading of `id` until the work is known
to the memory that a new life clears. Else a new life could take what is then dropped as the old
one's: held in SQL by a live worker, and run by nobody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from pdbatch.config import Settings
from pdbatch.engine.messages import EngineInfo
from pdbatch.ids import WorkerId
from pdbatch.store import Store
from tasks.worker.loop import Loop

logger = logging.getLogger(__name__)


class Life:
    """`begin` once the engine is ready; `id` and `epoch` change when the worker is fenced."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        info: EngineInfo,
        *,
        name: str,
        host: str,
        stats: Callable[[], Mapping[str, Any]],
        on_fenced: Callable[[int], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._store, self._settings, self._info = store, settings, info
        self._name, self._host = name, host
        self._stats, self._on_fenced = stats, on_fenced
        self.taking = threading.Lock()
        self.id = self._register()
        self._loop = Loop("heart", self._beat, on_bug)

    @property
    def epoch(self) -> int:
        """The number of this life, above all before it."""
        return int(self.id.rpartition("#")[2])

    def begin(self) -> None:
        """Give signs of life from now on."""
        self._loop.start()

    def end(self) -> None:
        """Leave in order: what is still here goes back to the queue, nobody's failure."""
        self._loop.stop()
        self._store.workers.retire(self.id)

    def halt(self) -> None:
        """No further sign of life, and no new life; what is under way is not waited for."""
        self._loop.stop(timeout_s=0.0)

    def beat_now(self) -> None:
        """A sign of life with fresh figures, soon."""
        self._loop.wake()

    def _register(self) -> WorkerId:
        return self._store.workers.register(
            self._name,
            self._host,
            self._settings.role,
            self._settings.model,
            self._info.device,
            msgspec.to_builtins(self._info),
        )

    def _beat(self) -> float:
        if not self._store.workers.heartbeat(self.id, self._stats()):
            logger.warning("%s was declared dead; it drops its work and begins anew", self.id)
            with self.taking:
                self.id = self._register()
                self._on_fenced(self.epoch)
        return self._settings.heartbeat_s
