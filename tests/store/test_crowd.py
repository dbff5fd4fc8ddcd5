"""Many at once: feeders, prefill and decode workers, reapers, a killer, on one database.

Every thread has a store of its own, as every process would. The seed is printed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from pdbatch.errors import IllegalTransition
from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.states import JobState
from pdbatch.store import Counts, IngestRow, NewJob, ShardMessage, Store

from .books import BODY, audit, execute, make_job, result, worker

NUM_REQUESTS = 400
DEADLINE_S = 60


class Crowd:
    """What the threads share beside the database: the queue, and the ready KV."""

    def __init__(self, url: str, seed: int, jobs: list[JobId]) -> None:
        self.url = url
        self.seed = seed
        self.jobs = jobs
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.queue: list[ShardMessage] = []
        self.ready: set[tuple[JobId, RequestIndex]] = set()
        self.failures: list[BaseException] = []

    def run(self, *roles: Callable[[Store, random.Random], None]) -> None:
        """Each role in a thread until all jobs are over."""
        threads = [
            threading.Thread(target=self._one, args=(role, number))
            for number, role in enumerate(roles)
        ]
        for thread in threads:
            thread.start()
        give_up_at = time.monotonic() + DEADLINE_S
        with Store.open(self.url) as store:
            while time.monotonic() < give_up_at and not self.over.wait(0.05):
                states = store.jobs.states(self.jobs).values()
                if self.failures or all(state is JobState.COMPLETED for state in states):
                    break
        self.over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]

    def _one(self, role: Callable[[Store, random.Random], None], number: int) -> None:
        dice = random.Random(self.seed * 100 + number)
        try:
            with Store.open(self.url, max_attempts=10**6) as store:
                role(store, dice)
        except BaseException as error:
            self.failures.append(error)
            self.over.set()

    def feeder(self, store: Store, dice: random.Random) -> None:
        while not self.over.is_set():
            taken = store.shards.take_for_publish("m", 0, dice.randint(1, 4))
            with self.lock:
                self.queue += taken + taken[:1]  # some messages twice
                dice.shuffle(self.queue)
                lost = bool(self.queue) and dice.random() < 0.1
                if lost:
                    self.queue.clear()
            if lost:
                store.shards.requeue(store.now() + 1, "m", 0)
            store.workers.reap(ttl_s=5)
            self.over.wait(0.002)

    def prefiller(self, store: Store, dice: random.Random) -> None:
        me = worker(store, f"prefiller{threading.get_ident()}")
        while not self.over.is_set():
            with self.lock:
                message = self.queue.pop() if self.queue else None
            if message is None:
                self.over.wait(0.002)
                continue
            if not store.workers.heartbeat(me):
                me = worker(store, me.partition("@")[0])
            claimed = store.shards.claim(me, *message)
            if claimed is None:
                continue
            published = {(claimed.job, request.index) for request in claimed.requests}
            with self.lock:
                self.ready |= published
            for _ in range(20):  # until all of it was taken, or long enough
                if all(store.holds.owners(published).values()) or self.over.wait(0.005):
                    break
            store.shards.hand_off(me, claimed.job, claimed.shard, claimed.attempt)

    def decoder(self, store: Store, dice: random.Random) -> None:
        me = worker(store, f"decoder{threading.get_ident()}")
        while not self.over.is_set():
            with self.lock:
                wanted = dice.sample(sorted(self.ready), min(len(self.ready), 7))
            if not wanted:
                self.over.wait(0.002)
                continue
            if not store.workers.heartbeat(me):
                me = worker(store, me.partition("@")[0])
            granted = sorted(store.holds.take(me, wanted), key=lambda _: dice.random())
            with self.lock:
                self.ready -= set(wanted)
            done, dropped = (
                granted[: len(granted) * 2 // 3 + 1],
                granted[len(granted) * 2 // 3 + 1 :],
            )
            store.holds.drop(me, dropped, failed=dice.random() < 0.5)
            store.results.write(me, [result(*key) for key in done])
            if dice.random() < 0.02:
                store.workers.retire(me)

    def killer(self, store: Store, dice: random.Random) -> None:
        while not self.over.wait(0.05):
            live = store.workers.list()
            if live:
                victim: WorkerId = dice.choice(live).id
                late = "UPDATE workers SET heartbeat_at = 1 WHERE id = :id"
                execute(self.url, late, id=victim)


def test_a_crowd_loses_and_doubles_nothing(database_url: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    with Store.open(database_url) as store:
        jobs = [make_job(store, NUM_REQUESTS, shard_size=8) for _ in range(2)]
        crowd = Crowd(database_url, seed, jobs)
        roles = [crowd.feeder] * 2 + [crowd.prefiller] * 2 + [crowd.decoder] * 3 + [crowd.killer]
        crowd.run(*roles)
        for job in jobs:
            view = store.jobs.get(job)
            assert view.state is JobState.COMPLETED, (seed, view)
            assert view.counts == Counts(total=NUM_REQUESTS, succeeded=NUM_REQUESTS)
            indexes = [row.index for row in store.results.iterate(job)]
            assert indexes == list(range(NUM_REQUESTS))
    audit(database_url)


def test_two_that_end_the_last_two_shards_end_the_job(database_url: str) -> None:
    with Store.open(database_url) as store:
        for _ in range(10):
            job = make_job(store, 8)
            start = threading.Barrier(2)

            def write(first: int, job: JobId = job, start: threading.Barrier = start) -> None:
                start.wait()
                store.results.write(None, [result(job, i) for i in range(first, first + 4)])

            threads = [threading.Thread(target=write, args=(first,)) for first in (0, 4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert store.jobs.get(job).state is JobState.COMPLETED
    audit(database_url)


def test_writers_of_the_same_rows_in_any_order_write_each_once(database_url: str) -> None:
    with Store.open(database_url) as store:
        job = make_job(store, 200, shard_size=5)
        written: list[int] = []

        def write(seed: int) -> None:
            order = list(range(200))
            random.Random(seed).shuffle(order)
            for start in range(0, 200, 40):
                rows = [result(job, i) for i in order[start : start + 40]]
                written.append(store.results.write(None, rows))

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(written) == 200
        assert store.jobs.get(job).state is JobState.COMPLETED
    audit(database_url)


def test_a_cancel_beside_ingest_leaves_nothing_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbatch.store.ingest._ROWS_AT_ONCE", 20)
    with Store.open(database_url) as store:
        job = store.jobs.create(NewJob())
        half = threading.Event()

        def ingest() -> None:
            with (
                pytest.raises(IllegalTransition),
                store.ingest(job, shard_size=4, default_model="m") as into,
            ):
                for i in range(100_000):
                    into.add(IngestRow(i, None, None, BODY))
                    if i == 100:
                        half.set()

        thread = threading.Thread(target=ingest)
        thread.start()
        assert half.wait(30)
        assert store.jobs.cancel(job) is JobState.CANCELLED
        thread.join(60)
        assert not thread.is_alive()
        view = store.jobs.get(job)
        assert view.state is JobState.CANCELLED
        assert view.counts.failed == view.counts.total >= 100
    audit(database_url)
