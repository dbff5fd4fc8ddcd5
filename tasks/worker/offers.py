"""What a prefill worker offers: published, kept alive, and let go of when it ended.

1. `take`: the engine pinned a request; its descriptor waits to be published.
2. `_publish`: descriptors go into the registry, many at a time.
3. `_collect`: the registry tells what ended. Released: a decode worker has it, unpin. Failed: the
   KV could not be had, unpin and run the request again. Expired: ask SQL, as in 4.
4. `_keep`, about every second: leases are renewed. What the registry does not know any more
   (it was emptied) is unpinned where SQL says that a live worker or a row has it, else published
   again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence

from pdbatch.engine.handoff import Publication, Registry, RegistryUnavailable
from pdbatch.engine.messages import Handoff
from pdbatch.ids import WorkerId, split_key
from pdbatch.store import Store
from tasks.worker.loop import Loop

logger = logging.getLogger(__name__)

KEEP_EVERY_S = 1.0
COLLECT_WAIT_S = 0.5
MOST_AT_ONCE = 128


class Offers:
    """Owns the publications of one worker. `on_left`, `on_failed` get keys, `unpin` hand-offs."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        *,
        worker: Callable[[], WorkerId],
        host: str,
        lease_s: float,
        unpin: Callable[[list[str]], None],
        on_left: Callable[[list[str]], None],
        on_failed: Callable[[str, str], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._registry, self._store = registry, store
        self._worker, self._host, self._lease_s = worker, host, lease_s
        self._unpin, self._on_left, self._on_failed = unpin, on_left, on_failed
        self._new: queue.SimpleQueue[Handoff] = queue.SimpleQueue()
        self._again: list[Handoff] = []
        self._lock = threading.Lock()
        self._offered: dict[str, Handoff] = {}
        away = (RegistryUnavailable,)
        self._loops = [
            Loop("publisher", self._publish, on_bug, away),
            Loop("collector", self._collect, on_bug, away),
            Loop("keeper", self._keep, on_bug, away),
        ]
        for loop in self._loops:
            loop.start()

    def __len__(self) -> int:
        return len(self._offered)

    def take(self, handoffs: Sequence[Handoff]) -> None:
        """Pinned requests, to be published."""
        with self._lock:
            self._offered.update((handoff.handoff_id, handoff) for handoff in handoffs)
        for handoff in handoffs:
            self._new.put(handoff)

    def withdraw(self, keys: Iterable[str] | None = None) -> None:
        """Stop offering these requests (all: None); their blocks are unpinned by the caller."""
        wanted = None if keys is None else set(keys)
        with self._lock:
            ids = [i for i, h in self._offered.items() if wanted is None or h.key in wanted]
            for handoff_id in ids:
                del self._offered[handoff_id]
        try:
            self._registry.withdraw(self._worker(), ids)
        except RegistryUnavailable as error:
            logger.warning(
                "%d hand-offs stay published until their lease ends: %s", len(ids), error
            )

    def stop(self) -> None:
        """No further step."""
        for loop in self._loops:
            loop.stop(timeout_s=2.0)

    def _publish(self) -> float:
        batch, self._again = self._again, []
        if not batch:
            try:
                batch.append(self._new.get(timeout=0.5))
                while len(batch) < MOST_AT_ONCE:
                    batch.append(self._new.get_nowait())
            except queue.Empty:
                pass
        with self._lock:
            batch = [handoff for handoff in batch if handoff.handoff_id in self._offered]
        if batch:
            try:
                self._registry.publish([self._publication(h) for h in batch], self._lease_s)
            except RegistryUnavailable:
                self._again = batch
                raise
        return 0.0

    def _publication(self, handoff: Handoff) -> Publication:
        return Publication(
            handoff.handoff_id, self._worker(), self._host, handoff.num_bytes, handoff.descriptor
        )

    def _collect(self) -> float:
        left: list[Handoff] = []
        expired: list[str] = []
        for end in self._registry.collect(self._worker(), COLLECT_WAIT_S):
            if end.kind == "expired":
                expired.append(end.id)
                continue
            with self._lock:
                handoff = self._offered.pop(end.id, None)
            if handoff is None:
                continue
            if end.kind == "failed":
                self._unpin([handoff.handoff_id])
                self._on_failed(handoff.key, end.reason)
            else:
                left.append(handoff)
        self._settle(left)
        if expired:
            self._settle_unknown(expired)
        return 0.0

    def _keep(self) -> float:
        with self._lock:
            ids = list(self._offered)
        if ids:
            unknown = self._registry.renew_published(self._worker(), ids, self._lease_s)
            if unknown:
                gone = self._registry.missing(self._worker(), unknown)
                self._settle_unknown([i for i in gone if not self._is_waiting(i)])
        return KEEP_EVERY_S

    def _is_waiting(self, handoff_id: str) -> bool:
        """Whether its first publication is still being tried."""
        return handoff_id in {handoff.handoff_id for handoff in self._again}

    def _settle_unknown(self, handoff_ids: Sequence[str]) -> None:
        """The registry has forgotten these: SQL says whether somebody has them."""
        with self._lock:
            known = [self._offered[i] for i in handoff_ids if i in self._offered]
        if not known:
            return
        owners = self._store.holds.owners([split_key(handoff.key) for handoff in known])
        taken = [handoff for handoff in known if owners[split_key(handoff.key)] is not None]
        with self._lock:
            taken = [h for h in taken if self._offered.pop(h.handoff_id, None) is not None]
        self._settle(taken)
        rest = [handoff for handoff in known if owners[split_key(handoff.key)] is None]
        if rest:
            logger.info("%d hand-offs are published again", len(rest))
            for handoff in rest:
                self._new.put(handoff)

    def _settle(self, handoffs: Sequence[Handoff]) -> None:
        if handoffs:
            self._unpin([handoff.handoff_id for handoff in handoffs])
            self._on_left([handoff.key for handoff in handoffs])
