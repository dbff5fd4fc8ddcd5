"""Shards on their way in: claimed side by side, and again where no answer came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from pdbatch.errors import StoreError
from pdbatch.ids import JobId, ShardIndex, WorkerId
from tasks.worker.intake import CLAIMED_AT_ONCE, Intake
from tasks.worker.open_shards import OpenShards

WAIT_S = 20.0


class Claims:
    """The store's shards: `claim` is what the test gives."""

    def __init__(self, claim: Callable[[ShardIndex], None]) -> None:
        self.given_back: list[ShardIndex] = []
        self._claim = claim

    def claim(self, worker: WorkerId, job: JobId, shard: ShardIndex, attempt: int) -> None:
        """Granted to nobody: the message is over."""
        self._claim(shard)

    def give_back(self, worker: WorkerId, job: JobId, shard: ShardIndex, attempt: int) -> None:
        """Noted."""
        self.given_back.append(shard)


@contextmanager
def intake(claims: Claims, side_by_side: bool, bugs: list[BaseException]) -> Iterator[Intake]:
    store = SimpleNamespace(shards=claims, writes_side_by_side=side_by_side)
    life = SimpleNamespace(id=WorkerId("w#1"), taking=threading.Lock())
    made = Intake(
        store,  # type: ignore[arg-type]
        life,  # type: ignore[arg-type]
        OpenShards(),
        hands_off=False,
        may_claim=lambda: True,
        submit=lambda command: None,
        write=lambda rows: None,
        on_bug=bugs.append,
    )
    try:
        yield made
    finally:
        made.close()
        made.stop()


def test_claims_wait_for_the_database_side_by_side() -> None:
    begun, go_on, bugs = threading.Event(), threading.Event(), []
    together = threading.Barrier(CLAIMED_AT_ONCE, timeout=WAIT_S)

    def claim(shard: ShardIndex) -> None:
        if shard == 0:
            begun.set()
            assert go_on.wait(WAIT_S)  # until the others wait in the queue
        else:
            together.wait()

    over = threading.Semaphore(0)
    with intake(Claims(claim), True, bugs) as made:
        made.submit("job", 0, 1, over.release)
        assert begun.wait(WAIT_S)
        for shard in range(1, 1 + CLAIMED_AT_ONCE):
            made.submit("job", shard, 1, over.release)
        go_on.set()
        for _ in range(1 + CLAIMED_AT_ONCE):
            assert over.acquire(timeout=WAIT_S)
    assert not bugs


def test_one_after_the_other_where_writers_wait_for_each_other() -> None:
    running, most, bugs = [0], [0], []
    lock, over = threading.Lock(), threading.Semaphore(0)

    def claim(shard: ShardIndex) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        with lock:
            running[0] -= 1

    with intake(Claims(claim), False, bugs) as made:
        for shard in range(50):
            made.submit("job", shard, 1, over.release)
        for _ in range(50):
            assert over.acquire(timeout=WAIT_S)
    assert most == [1] and not bugs


def test_a_claim_without_an_answer_is_given_back_and_tried_again() -> None:
    tried: list[ShardIndex] = []
    bugs: list[BaseException] = []

    def claim(shard: ShardIndex) -> None:
        tried.append(shard)
        if tried.count(shard) == 1 and shard % 2:
            raise StoreError("the database went away")

    claims, over = Claims(claim), threading.Semaphore(0)
    with intake(claims, True, bugs) as made:
        for shard in range(6):
            made.submit("job", shard, 1, over.release)
        for _ in range(6):
            assert over.acquire(timeout=WAIT_S)
    assert sorted(tried) == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert sorted(claims.given_back) == [1, 3, 5] and not bugs
