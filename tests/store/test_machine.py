"""Any order of events keeps the books: a random walk, checked by the auditor after each step.

Hypothesis prints the walk that fails; `--hypothesis-seed` repeats a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from pdbatch.ids import JobId, RequestIndex, WorkerId
from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import ClaimedShard, NewJob, ShardMessage, Store

from .books import audit, claim_next, execute, finish, keys, make_job, result, worker

NAMES = ("a", "b", "c")
SIZE = 6
indexes = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=4, unique=True)
names = st.sampled_from(NAMES)


class Walk(RuleBasedStateMachine):
    """Jobs of six requests in shards of three, three workers that come and go."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store.open(self.url, max_attempts=3)
        self.jobs: list[JobId] = []
        self.workers: dict[str, WorkerId] = {name: worker(self.store, name) for name in NAMES}
        self.messages: list[ShardMessage] = []
        self.claims: list[tuple[WorkerId, ClaimedShard]] = []
        self.rows: dict[tuple[JobId, RequestIndex], bytes] = {}

    def teardown(self) -> None:
        """Whatever happened, one worker that stays brings every job to its end."""
        for job in self.jobs:
            self.store.results.write(None, [])
            self.store.jobs.get(job)
        execute(self.url, "UPDATE workers SET heartbeat_at = 1 WHERE state = 'live'")
        self.store.workers.reap(5)
        self.store.shards.requeue(self.store.now() + 9, "m", 0)
        last = worker(self.store, "last")
        while self.store.shards.pending_queues():
            claimed = claim_next(self.store, last)
            if claimed is not None:
                finish(self.store, last, claimed)
        for job in self.jobs:
            view = self.store.jobs.get(job)
            assert view.state in TERMINAL_JOB_STATES
            seen = [row.index for row in self.store.results.iterate(job)]
            assert seen == list(range(SIZE)), f"{job}: {seen}"
            assert view.counts.done == view.counts.total == SIZE
        audit(self.url)
        self.store.close()

    @invariant()
    def the_books_are_right(self) -> None:
        audit(self.url)

    @invariant()
    def rows_never_change(self) -> None:
        for job in self.jobs:
            for row in self.store.results.iterate(job):
                assert self.rows.setdefault((job, row.index), row.body) == row.body

    @precondition(lambda self: len(self.jobs) < 3)
    @rule(weight=st.integers(1, 3), reject=st.booleans())
    def submit(self, weight: int, reject: bool) -> None:
        rejects = [1] if reject else []
        job = NewJob(weight=weight)
        self.jobs.append(make_job(self.store, SIZE, shard_size=3, rejects=rejects, job=job))

    @rule(limit=st.integers(1, 3))
    def publish(self, limit: int) -> None:
        self.messages += self.store.shards.take_for_publish("m", 0, limit)

    @rule()
    def requeue(self) -> None:
        self.store.shards.requeue(self.store.now() + 1, "m", 0)

    @precondition(lambda self: self.messages)
    @rule(name=names, data=st.data())
    def claim(self, name: str, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.messages))  # old ones come again
        claimed = self.store.shards.claim(self.workers[name], *message)
        if claimed is not None:
            self.claims.append((self.workers[name], claimed))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), how=st.sampled_from(["hand_off", "give_back", "fail", "finish"]))
    def end_claim(self, data: st.DataObject, how: str) -> None:
        owner, claimed = data.draw(st.sampled_from(self.claims))
        shards = self.store.shards
        args = (owner, claimed.job, claimed.shard, claimed.attempt)
        ends: dict[str, Callable[[], object]] = {
            "hand_off": lambda: shards.hand_off(*args),
            "give_back": lambda: shards.give_back(*args),
            "fail": lambda: shards.give_back(*args, failed=True),
            "finish": lambda: finish(self.store, owner, claimed),
        }
        ends[how]()

    @rule(name=names, decoder=names, drop=st.booleans())
    def hand_off(self, name: str, decoder: str, drop: bool) -> None:
        """A whole shard's usual way from one worker to another, who may drop some of it."""
        owner, holder = self.workers[name], self.workers[decoder]
        claimed = claim_next(self.store, owner)
        if claimed is None:
            return
        held = keys(claimed.job, *(request.index for request in claimed.requests))
        assert self.store.holds.take(holder, held) == set(held)
        assert self.store.shards.hand_off(owner, claimed.job, claimed.shard, claimed.attempt)
        audit(self.url)
        if drop:
            assert self.store.holds.drop(holder, held[:1]) == set(held[:1])

    @precondition(lambda self: self.jobs)
    @rule(name=names, which=indexes, data=st.data())
    def hold(self, name: str, which: list[int], data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        wanted = keys(job, *which)
        before = self.store.holds.owners(wanted)
        granted = self.store.holds.take(self.workers[name], wanted)
        allowed = {None, self.workers[name]}
        assert granted == {key for key in wanted if before[key] in allowed}

    @precondition(lambda self: self.jobs)
    @rule(name=names, which=indexes, failed=st.booleans(), data=st.data())
    def drop(self, name: str, which: list[int], failed: bool, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        self.store.holds.drop(self.workers[name], keys(job, *which), failed)

    @precondition(lambda self: self.jobs)
    @rule(name=names, which=indexes, data=st.data())
    def write(self, name: str, which: list[int], data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        have = {row.index for row in self.store.results.iterate(job)}
        new = self.store.results.write(self.workers[name], [result(job, i) for i in which])
        assert new == len(set(which) - have)

    @rule(name=names, how=st.sampled_from(["reap", "retire", "restart"]))
    def end_life(self, name: str, how: str) -> None:
        if how == "reap":
            execute(
                self.url,
                "UPDATE workers SET heartbeat_at = 1 WHERE id = :id",
                id=self.workers[name],
            )
            assert self.store.workers.reap(5) == [self.workers[name]]
        elif how == "retire":
            self.store.workers.retire(self.workers[name])
        self.workers[name] = worker(self.store, name)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), shard=st.integers(0, 2), whole=st.booleans())
    def cancel(self, data: st.DataObject, shard: int, whole: bool) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if whole:
            assert self.store.jobs.cancel(job) in TERMINAL_JOB_STATES
        else:
            self.store.shards.cancel(job, shard)


def _run(urls: Callable[[], str], num_examples: int) -> None:
    class Walked(Walk):
        def __init__(self) -> None:
            type(self).url = urls()
            super().__init__()

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_machine(
        Walked,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=slow,
        ),
    )


def test_any_walk_keeps_the_books_on_sqlite(sqlite_template: bytes, tmp_path: Path) -> None:
    numbers = itertools.count()

    def fresh() -> str:
        path = tmp_path / f"walk{next(numbers)}.db"
        path.write_bytes(sqlite_template)
        return f"sqlite:///{path}"

    _run(fresh, 25)


@pytest.mark.postgres
def test_any_walk_keeps_the_books_on_postgres(pg_store_url: str) -> None:
    def emptied() -> str:
        tables = "jobs, shards, requests, results, holds, attempts, workers"
        execute(pg_store_url, f"TRUNCATE {tables}")
        return pg_store_url

    _run(emptied, 8)
