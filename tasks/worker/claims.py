"""What a decode worker claims: from the registry's claim to the proved KV in its engine.

1. `_claim`: as many hand-offs as there is room for, the own host's first. From here on `_renew`
   keeps their leases.
2. A hold in SQL for each. Refused (it has a row, or a live worker): released at once, so that the
   producer unpins. So is the second hand-off of a request that is here already; that comes of
   a registry that was emptied.
3. `Adopt` to the engine, which pulls and proves.
4. `pulled`: released in the registry; the producer unpins. `failed`: the hold is dropped and the
   producer told, which runs the request again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from pdbatch.engine.handoff import Claim, Registry, RegistryUnavailable
from pdbatch.engine.messages import Adopt, Adoption, PullFailed
from pdbatch.errors import UnknownJob
from pdbatch.ids import WorkerId, split_key
from pdbatch.store import Key, Store
from tasks.worker.loop import Loop
from tasks.worker.room import Room

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 128
IDLE_WAIT_S = 0.02
LONGEST_IDLE_WAIT_S = 0.1


def key_of(handoff_id: str) -> str:
    """The request of a hand-off: ids are `<key>/<something unique>`."""
    return handoff_id.partition("/")[0]


class Claims:
    """Owns the claims of one worker, from the claim to its release."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        room: Room,
        *,
        worker: Callable[[], WorkerId],
        taking: AbstractContextManager[object],
        host: str,
        lease_s: float,
        claim_bytes: int,
        may_claim: Callable[[], bool],
        adopt: Callable[[Adopt], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._registry, self._store, self._room = registry, store, room
        self._worker, self._taking, self._host = worker, taking, host
        self._lease_s, self._claim_bytes = lease_s, claim_bytes
        self._may_claim, self._adopt = may_claim, adopt
        self._lock = threading.Lock()
        self._fences: dict[str, int] = {}
        self._ended: queue.SimpleQueue[tuple[str, PullFailed | None]] = queue.SimpleQueue()
        self._unsettled: list[tuple[str, PullFailed | None]] = []
        self._idle_s = IDLE_WAIT_S
        self._unsure: set[Key] = set()
        """Holds that may be ours: the database did not answer."""
        away = (RegistryUnavailable,)
        self._claimer = Loop("claimer", self._claim, on_bug, away)
        self._loops = [
            self._claimer,
            Loop("releaser", self._settle, on_bug, away),
            Loop("renewer", self._renew, on_bug, away),
        ]
        for loop in self._loops:
            loop.start()

    def __len__(self) -> int:
        return len(self._fences)

    def pulled(self, handoff_ids: Iterable[str]) -> None:
        """The KV of these is here and proved."""
        ids = list(handoff_ids)
        self._room.pulled(ids)
        for handoff_id in ids:
            self._ended.put((handoff_id, None))

    def failed(self, failure: PullFailed) -> None:
        """A pull did not end in proved KV."""
        key = failure.key or key_of(failure.handoff_id)
        self._room.gone(key, failure.handoff_id)
        self._ended.put((failure.handoff_id, failure))

    def wake(self) -> None:
        """There may be room again."""
        self._claimer.wake()

    def stop_claiming(self) -> None:
        """Claim nothing more; what is claimed goes on."""
        self._claimer.stop()

    def clear(self) -> None:
        """A new life: forget all claims; their leases end by themselves."""
        with self._lock:
            self._fences.clear()

    def stop(self) -> None:
        """No further step."""
        for loop in self._loops:
            loop.stop(timeout_s=2.0)

    def _claim(self) -> float:
        with self._taking:
            return self._claim_now()

    def _claim_now(self) -> float:
        if self._unsure:
            self._store.holds.drop(self._worker(), self._unsure)
            self._unsure.clear()
        count, room_bytes = self._room.left()
        count = min(count, MOST_AT_ONCE)
        if not count or not room_bytes or not self._may_claim():
            return LONGEST_IDLE_WAIT_S
        worker = self._worker()
        budget = min(room_bytes, self._claim_bytes)
        claims = self._registry.claim(worker, self._host, count, budget, self._lease_s)
        if not claims:
            self._idle_s = min(self._idle_s * 1.3, LONGEST_IDLE_WAIT_S)
            return self._idle_s
        self._idle_s = IDLE_WAIT_S
        with self._lock:
            self._fences.update((claim.id, claim.fence) for claim in claims)
        self._take(worker, claims)
        return 0.0

    def _take(self, worker: WorkerId, claims: list[Claim]) -> None:
        new = [claim for claim in claims if not self._room.has(key_of(claim.id))]
        for claim in claims:
            if claim not in new and not self._room.is_pulling(claim.id):
                self._ended.put((claim.id, None))
        keys = {claim.id: split_key(key_of(claim.id)) for claim in new}
        try:
            granted = self._granted(worker, list(keys.values()))
            taken = self._taken_by_others(set(keys.values()) - granted)
        except BaseException:
            self._unsure.update(keys.values())
            self._forget(keys)
            raise
        mine = [claim for claim in new if keys[claim.id] in granted]
        for claim in new:
            if keys[claim.id] in taken:
                self._ended.put((claim.id, None))
        self._forget([id_ for id_, key in keys.items() if key not in taken | granted])
        for claim in mine:
            self._room.claimed(claim.id, key_of(claim.id), claim.num_bytes)
        if mine:
            self._adopt(Adopt([Adoption(claim.id, claim.descriptor) for claim in mine]))

    def _forget(self, handoff_ids: Iterable[str]) -> None:
        """Not ours after all (we are fenced, or the database is away): leases end, others claim."""
        with self._lock:
            for handoff_id in handoff_ids:
                self._fences.pop(handoff_id, None)

    def _granted(self, worker: WorkerId, keys: list[Key]) -> set[Key]:
        return _each_job(lambda known: self._store.holds.take(worker, known), keys)

    def _taken_by_others(self, keys: set[Key]) -> set[Key]:
        """Those with a row or a live holder."""

        def taken(known: list[Key]) -> set[Key]:
            owners = self._store.holds.owners(known)
            return {key for key, owner in owners.items() if owner is not None}

        return _each_job(taken, list(keys)) if keys else set()

    def _settle(self) -> float:
        """Release what was pulled, report what failed; many at a time, again after an outage."""
        if not self._unsettled:
            try:
                self._unsettled.append(self._ended.get(timeout=0.5))
                while len(self._unsettled) < MOST_AT_ONCE:
                    self._unsettled.append(self._ended.get_nowait())
            except queue.Empty:
                pass
        failures = [failure for _, failure in self._unsettled if failure is not None]
        if failures:
            keys = [split_key(f.key or key_of(f.handoff_id)) for f in failures]
            self._store.holds.drop(self._worker(), keys)
        for failure in failures:
            logger.warning("%s: %s: %s", failure.handoff_id, failure.code, failure.message)
            self._registry.fail(
                self._with_fences([failure.handoff_id]), f"{failure.code}: {failure.message}"
            )
        pulled = [handoff_id for handoff_id, failure in self._unsettled if failure is None]
        self._registry.release(self._with_fences(pulled))
        with self._lock:
            for handoff_id, _ in self._unsettled:
                self._fences.pop(handoff_id, None)
        self._unsettled = []
        return 0.0

    def _with_fences(self, handoff_ids: Iterable[str]) -> list[tuple[str, int]]:
        with self._lock:
            return [(i, self._fences[i]) for i in handoff_ids if i in self._fences]

    def _renew(self) -> float:
        with self._lock:
            held = list(self._fences.items())
        if held:
            lost = self._registry.renew(held, self._lease_s)
            if lost:
                logger.info("%d claims were lost; their holds decide", len(lost))
                with self._lock:
                    for handoff_id in lost:
                        self._fences.pop(handoff_id, None)
        return self._lease_s / 4


def _each_job(work: Callable[[list[Key]], set[Key]], keys: list[Key]) -> set[Key]:
    """`work` on all keys; on those of each job apart where a job is unknown (it was offered by a
    worker on another database) and leaves its keys out."""
    try:
        return work(keys)
    except UnknownJob as error:
        by_job: dict[str, list[Key]] = {}
        for key in keys:
            by_job.setdefault(key[0], []).append(key)
        if len(by_job) > 1:
            return set().union(*(_each_job(work, some) for some in by_job.values()))
        logger.error("hand-offs are left alone: %s", error)
        return set()
