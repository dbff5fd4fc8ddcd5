"""Shards on their way into a prefill or mixed worker, and their ends.

1. `submit`: a message has come. A thread claims its shard in SQL, several side by side where the
   database lets it; refused: `on_over` at once.
2. What is left of it goes to the engine in one command, and into `OpenShards`.
3. When its last request left (its row is written, or a decode worker has it), a prefill worker
   tells SQL that the shard is handed off. Then `on_over`.

A claim whose answer was lost with the database may have been granted: it is given back before
it is tried again, so that no shard stays claimed by a worker that does not run it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from pdbatch.engine.messages import EngineRequest, Submit
from pdbatch.errors import StoreError, UnknownJob
from pdbatch.formats import decode_spec
from pdbatch.ids import JobId, RequestKey, ShardIndex, WorkerId, request_key
from pdbatch.request import RequestError, RequestOutput, RequestSpec
from pdbatch.store import ClaimedShard, Store
from tasks.worker.life import Life
from tasks.worker.loop import Loop
from tasks.worker.open_shards import OpenShard, OpenShards

logger = logging.getLogger(__name__)

Over = Callable[[], None]

CLAIMED_AT_ONCE = 4
"""Shards, side by side: a claim is mostly waiting for the database."""


class _Wanted(NamedTuple):
    """A shard to be claimed."""

    job: JobId
    shard: ShardIndex
    attempt: int
    on_over: Over
    unsure_of: WorkerId | None = None
    """Who may have it already: a claim whose answer did not come."""


class Intake:
    """`submit` from any thread; the rest in two of its own."""

    def __init__(
        self,
        store: Store,
        life: Life,
        shards: OpenShards,
        *,
        hands_off: bool,
        may_claim: Callable[[], bool],
        submit: Callable[[Submit], None],
        write: Callable[[Sequence[RequestOutput]], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._store, self._life, self._shards = store, life, shards
        self._hands_off, self._may_claim = hands_off, may_claim
        self._submit, self._write = submit, write
        self._closed = False
        self._at_once = CLAIMED_AT_ONCE if store.writes_side_by_side else 1
        self._threads = ThreadPoolExecutor(CLAIMED_AT_ONCE, thread_name_prefix="pdbatch-claim")
        self._wanted: queue.SimpleQueue[_Wanted] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[tuple[OpenShard, Over]] = queue.SimpleQueue()
        self._loops = [
            Loop("claims of shards", self._claim, on_bug),
            Loop("ends of shards", self._end, on_bug),
        ]
        for loop in self._loops:
            loop.start()

    def submit(self, job: str, shard: int, attempt: int, on_over: Over) -> None:
        """Claim it and run what is left of it. `on_over` is called once, from some thread: when
        all its requests have left, or at once where the claim is refused."""
        self._wanted.put(_Wanted(JobId(job), ShardIndex(shard), attempt, on_over))

    def close(self) -> None:
        """Claim nothing more: what comes from now on is dropped without `on_over`, its message is
        for another worker. Open shards go on to their ends."""
        self._closed = True

    def stop(self) -> None:
        """No further step."""
        for loop in self._loops:
            loop.stop(timeout_s=1.0)
        self._threads.shutdown(wait=False)

    def _claim(self) -> float:
        if not self._may_claim():
            return 0.1
        try:
            some = [self._wanted.get(timeout=0.5)]
        except queue.Empty:
            return 0.0
        with contextlib.suppress(queue.Empty):
            while len(some) < self._at_once:
                some.append(self._wanted.get_nowait())
        if self._closed:
            return 0.0
        failed: StoreError | None = None
        with self._life.taking:
            ends = list(self._threads.map(self._try, some)) if some[1:] else [self._try(some[0])]
        for wanted, end in zip(some, ends, strict=True):
            if isinstance(end, StoreError):
                failed = end
            elif not end:
                wanted.on_over()
        if failed is not None:
            raise failed
        return 0.0

    def _try(self, wanted: _Wanted) -> bool | StoreError:
        """`_take`; a shard whose claim got no answer is wanted again."""
        try:
            return self._take(wanted)
        except StoreError as error:
            self._wanted.put(wanted._replace(unsure_of=self._life.id))
            return error

    def _take(self, wanted: _Wanted) -> bool:
        """Claim and submit; False where there is nothing to run."""
        job, shard, attempt = wanted.job, wanted.shard, wanted.attempt
        try:
            if wanted.unsure_of:
                self._store.shards.give_back(wanted.unsure_of, job, shard, attempt)
            claimed = self._store.shards.claim(self._life.id, job, shard, attempt)
        except UnknownJob as error:
            logger.error("a message is dropped: %s", error)  # it is of another database
            return False
        if claimed is not None:
            self._run(claimed, wanted.on_over)
        return claimed is not None

    def _run(self, claimed: ClaimedShard, on_over: Over) -> None:
        requests: dict[RequestKey, EngineRequest] = {}
        broken: list[RequestOutput] = []
        for request in claimed.requests:
            key = request_key(claimed.job, request.index)
            try:
                spec = decode_spec(request.body)
            except (msgspec.MsgspecError, ValueError) as error:
                broken.append(RequestOutput(key=key, error=_unreadable(error)))
                spec = _NOTHING
            requests[key] = EngineRequest(key=key, spec=spec, priority=claimed.priority)
        self._shards.add(
            OpenShard(
                job=claimed.job,
                shard=claimed.shard,
                attempt=claimed.attempt,
                on_over=lambda shard: self._over.put((shard, on_over)),
                left=requests,
            )
        )
        self._write(broken)
        runnable = requests.keys() - {output.key for output in broken}
        if runnable:
            self._submit(Submit([one for key, one in requests.items() if key in runnable]))

    def _end(self) -> float:
        try:
            shard, on_over = self._over.get(timeout=0.5)
        except queue.Empty:
            return 0.0
        if self._hands_off:
            try:
                self._store.shards.hand_off(self._life.id, shard.job, shard.shard, shard.attempt)
            except StoreError:
                self._over.put((shard, on_over))
                raise
        on_over()
        return 0.0


_NOTHING = RequestSpec(prompt="")


def _unreadable(error: Exception) -> RequestError:
    return RequestError(
        code="batch_failed",
        message=f"The stored request cannot be read: {error}; submit it again.",
    )
