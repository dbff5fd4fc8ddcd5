"""Who answers for what: shards, holds, workers."""

from __future__ import annotations

import msgspec
import pytest

from pdbatch.errors import StoreError
from pdbatch.ids import JobId, WorkerId
from pdbatch.request import RequestOutput
from pdbatch.states import JobState, ResultStatus
from pdbatch.store import ClaimedShard, Counts, NewJob, ShardMessage, Store

from .books import audit, claim_next, execute, finish, keys, make_job, result, worker


def _indexes(claimed: ClaimedShard | None) -> list[int]:
    return [] if claimed is None else [request.index for request in claimed.requests]


def _retries(claimed: ClaimedShard | None) -> list[int]:
    assert claimed is not None
    return [request.num_retries for request in claimed.requests]


def _die(store: Store, url: str, worker_id: WorkerId) -> None:
    execute(url, "UPDATE workers SET heartbeat_at = 1 WHERE id = :id", id=worker_id)
    assert store.workers.reap(ttl_s=5) == [worker_id]


# --- feeding


def test_queues_are_by_model_and_priority(store: Store) -> None:
    make_job(store, 8, models=["a", "b"])
    make_job(store, 4, job=NewJob(priority=-1, model="b"))
    assert store.shards.pending_queues() == [("b", -1, 1), ("a", 0, 1), ("b", 0, 1)]
    assert len(store.shards.take_for_publish("b", 0, 10)) == 1
    assert store.shards.pending_queues() == [("b", -1, 1), ("a", 0, 1)]
    assert store.shards.queued_queues(store.now() + 1) == [("b", 0, 1)]
    assert store.shards.queued_queues(store.now() - 60) == []


def test_a_small_job_behind_a_huge_one_gets_the_next_places(store: Store) -> None:
    huge = make_job(store, 200, shard_size=1)
    assert len(store.shards.take_for_publish("m", 0, 64)) == 64
    small = make_job(store, 3, shard_size=1)
    taken = [message.job for message in store.shards.take_for_publish("m", 0, 10)]
    assert taken == [small] * 3 + [huge] * 7


def test_places_go_round_by_weight(store: Store) -> None:
    light = make_job(store, 100, shard_size=1)
    heavy = make_job(store, 100, shard_size=1, job=NewJob(weight=3))
    taken = [message.job for message in store.shards.take_for_publish("m", 0, 40)]
    assert (taken.count(light), taken.count(heavy)) == (10, 30)
    assert light in taken[:4]  # mixed, not one after the other


def test_a_message_that_got_lost_is_published_again(store: Store, database_url: str) -> None:
    make_job(store, 8)
    first, second = store.shards.take_for_publish("m", 0, 2, now=1000.0)
    assert store.shards.requeue(1000.0, "m", 0) == 0
    assert store.shards.requeue(1001.0, "other", 0) == 0
    me = worker(store)
    assert store.shards.claim(me, *first) is not None
    assert store.shards.requeue(1001.0, "m", 0) == 1
    assert store.shards.claim(me, *second) is None  # not while it waits in SQL
    assert store.shards.take_for_publish("m", 0, 9) == [second]  # the same attempt
    assert store.shards.claim(me, *second) is not None
    audit(database_url)


# --- claiming


def test_a_shard_is_claimed_once(store: Store, database_url: str) -> None:
    job = make_job(store, 4)
    (message,) = store.shards.take_for_publish("m", 0, 5)
    assert message == ShardMessage(job, 0, 1)
    one, two = worker(store, "one"), worker(store, "two")
    assert store.shards.claim(one, job, 0, 2) is None
    assert store.shards.claim(one, job, 7, 1) is None
    claimed = store.shards.claim(one, *message)
    assert claimed is not None
    assert (claimed.model, claimed.priority, _indexes(claimed)) == ("m", 0, [0, 1, 2, 3])
    assert store.shards.claim(two, *message) is None
    assert store.shards.claim(one, *message) is None
    (view, _) = store.workers.list()
    assert (view.name, view.num_shards) == ("one", 1)
    audit(database_url)


def test_a_worker_that_is_not_live_claims_and_takes_nothing(store: Store) -> None:
    job = make_job(store, 4)
    (message,) = store.shards.take_for_publish("m", 0, 5)
    gone = worker(store)
    store.workers.retire(gone)
    for nobody in (gone, WorkerId("never@host#1")):
        assert store.shards.claim(nobody, *message) is None
        assert store.holds.take(nobody, keys(job, 0)) == set()
        assert not store.workers.heartbeat(nobody)
    assert store.shards.claim(worker(store), *message) is not None


def test_a_claim_leaves_out_what_has_a_row_or_a_holder(store: Store, database_url: str) -> None:
    job = make_job(store, 4)
    decoder, me = worker(store, "decoder"), worker(store)
    store.results.write(decoder, [result(job, 1)])
    assert store.holds.take(decoder, keys(job, 2)) == set(keys(job, 2))
    assert _indexes(claim_next(store, me)) == [0, 3]
    audit(database_url)


def test_a_claim_of_a_shard_that_is_wholly_held_hands_it_off(
    store: Store, database_url: str
) -> None:
    job = make_job(store, 2)
    decoder, me = worker(store, "decoder"), worker(store)
    store.holds.take(decoder, keys(job, 0, 1))
    assert claim_next(store, me) is None
    audit(database_url)
    store.workers.retire(decoder)
    assert _retries(claim_next(store, me)) == [0, 0]
    audit(database_url)


def test_what_is_given_back_comes_again_with_the_next_attempt(
    store: Store, database_url: str
) -> None:
    job = make_job(store, 4)
    me = worker(store)
    assert claim_next(store, me) is not None
    store.results.write(me, [result(job, 0)])
    assert store.shards.give_back(me, job, 0, 1)
    assert not store.shards.give_back(me, job, 0, 1)
    again = claim_next(store, me)
    assert again is not None and again.attempt == 2
    assert (_indexes(again), _retries(again)) == ([1, 2, 3], [0, 0, 0])
    assert store.shards.give_back(me, job, 0, 2, failed=True)
    assert _retries(claim_next(store, me)) == [1, 1, 1]
    audit(database_url)


# --- handing off


def test_a_shard_is_handed_off_when_all_of_it_is_held(store: Store, database_url: str) -> None:
    job = make_job(store, 4)
    prefiller, decoder = worker(store, "prefiller"), worker(store, "decoder")
    assert claim_next(store, prefiller) is not None
    store.results.write(prefiller, [result(job, 0)])
    store.holds.take(decoder, keys(job, 1, 2, 3))
    assert store.shards.hand_off(prefiller, job, 0, 1)
    assert store.shards.hand_off(prefiller, job, 0, 1)  # asked again
    _die(store, database_url, prefiller)  # owns nothing of it
    assert store.results.write(decoder, [result(job, i) for i in (1, 2, 3)]) == 3
    view = store.jobs.get(job)
    assert (view.state, view.counts) == (JobState.COMPLETED, Counts(total=4, succeeded=4))
    audit(database_url)


def test_what_was_dropped_before_the_hand_off_goes_back(store: Store, database_url: str) -> None:
    job = make_job(store, 3)
    prefiller, decoder = worker(store, "prefiller"), worker(store, "decoder")
    assert claim_next(store, prefiller) is not None
    store.holds.take(decoder, keys(job, 0, 1, 2))
    assert store.holds.drop(decoder, keys(job, 1)) == set(keys(job, 1))
    assert not store.shards.hand_off(prefiller, job, 0, 1)
    again = claim_next(store, prefiller)
    assert again is not None and (again.attempt, _indexes(again)) == (2, [1])
    assert not store.shards.hand_off(prefiller, job, 0, 1)  # of the attempt before
    audit(database_url)


def test_what_is_dropped_after_the_hand_off_goes_back(store: Store, database_url: str) -> None:
    job = make_job(store, 3)
    prefiller, decoder = worker(store, "prefiller"), worker(store, "decoder")
    claim_next(store, prefiller)
    store.holds.take(decoder, keys(job, 0, 1, 2))
    assert store.shards.hand_off(prefiller, job, 0, 1)
    assert store.holds.drop(prefiller, keys(job, 2)) == set()  # not its own
    assert store.holds.drop(decoder, keys(job, 2), failed=True) == set(keys(job, 2))
    again = claim_next(store, prefiller)
    assert (_indexes(again), _retries(again)) == ([2], [1])
    audit(database_url)


# --- holds


def test_a_request_has_one_holder(store: Store, database_url: str) -> None:
    job, other = make_job(store, 4), make_job(store, 2)
    one, two = worker(store, "one"), worker(store, "two")
    store.results.write(None, [result(job, 3)])
    wanted = keys(job, 0, 1, 2, 3) + keys(other, 1) + keys(job, 99)
    assert store.holds.take(one, wanted[:2]) == set(wanted[:2])
    assert store.holds.take(two, wanted) == {*keys(job, 2), *keys(other, 1)}
    assert store.holds.take(one, wanted) == set(wanted[:2])
    assert store.holds.owners(wanted) == {
        wanted[0]: one,
        wanted[1]: one,
        wanted[2]: two,
        wanted[3]: "done",
        wanted[4]: two,
        wanted[5]: None,
    }
    assert store.holds.take(one, []) == set()
    assert [view.num_holds for view in store.workers.list()] == [2, 2]
    audit(database_url)


# --- results


def test_a_result_is_written_once(store: Store, database_url: str) -> None:
    job = make_job(store, 4)
    me, other = worker(store), worker(store, "other")
    store.holds.take(other, keys(job, 0, 1))
    rows = [result(job, 1), result(job, 0), result(job, 1)]
    assert store.results.write(me, rows) == 2
    assert store.results.write(other, rows) == 0
    assert store.results.write(me, []) == 0
    assert store.holds.owners(keys(job, 0)) == {keys(job, 0)[0]: "done"}
    row = store.results.get(job, 1)
    assert row is not None
    assert (row.custom_id, row.model, row.status) == ("c1", "m", ResultStatus.SUCCEEDED)
    assert (row.prompt_tokens, row.cached_tokens, row.output_tokens) == (5, 1, 2)
    assert row.finish_reason == "stop"
    assert row.body == result(job, 1).body
    assert store.results.get(job, 2) is None
    with pytest.raises(StoreError, match="no request 4"):
        store.results.write(me, [result(job, 4)])
    audit(database_url)


def test_results_stream_in_order_while_the_job_runs(store: Store) -> None:
    job = make_job(store, 500, rejects=[7, 300])
    make_job(store, 50, rejects=range(50))  # another job's rows are not seen
    order = [*range(499, 250, -1), *range(0, 100)]
    store.results.write(None, [result(job, i) for i in order if i not in (7, 300)])
    have = sorted({*order, 7, 300})
    assert [row.index for row in store.results.iterate(job)] == have
    assert [row.index for row in store.results.iterate(job, page=3)] == have
    assert [row.index for row in store.results.iterate(job, after=98)] == have[99:]
    bad = [row.index for row in store.results.iterate(job, ResultStatus.REJECTED)]
    assert bad == [7, 300]
    both = store.results.iterate(job, {ResultStatus.REJECTED, ResultStatus.FAILED})
    assert [row.index for row in both] == [7, 300]
    assert list(store.results.iterate(job, ResultStatus.FAILED)) == []
    good = store.results.iterate(job, ResultStatus.SUCCEEDED, page=10)
    assert len(list(good)) == len(have) - 2


# --- lives


def test_a_dead_workers_work_is_orphaned_and_counted(store: Store, database_url: str) -> None:
    job = make_job(store, 12)
    mine, other = worker(store, "mine"), worker(store, "other")
    assert _indexes(claim_next(store, mine)) == [0, 1, 2, 3]
    assert _indexes(claim_next(store, other)) == [4, 5, 6, 7]
    store.results.write(mine, [result(job, 0)])
    store.holds.take(other, keys(job, 1))
    store.holds.take(mine, keys(job, 4, 5))
    assert store.workers.reap(ttl_s=60) == []
    _die(store, database_url, mine)
    audit(database_url)
    assert not store.workers.heartbeat(mine)
    assert store.results.write(mine, [result(job, 8)]) == 1  # still as good as another
    third = worker(store, "third")
    again = claim_next(store, third)
    assert again is not None and again.attempt == 2
    assert (_indexes(again), _retries(again)) == ([2, 3], [1, 1])
    audit(database_url)


def test_a_live_claimer_keeps_its_shard_when_a_holder_dies(store: Store, database_url: str) -> None:
    job = make_job(store, 3)
    prefiller, decoder = worker(store, "prefiller"), worker(store, "decoder")
    claim_next(store, prefiller)
    store.holds.take(decoder, keys(job, 0, 1))
    _die(store, database_url, decoder)
    assert store.shards.pending_queues() == []  # the claimer has not finished
    store.results.write(prefiller, [result(job, 2)])
    assert not store.shards.hand_off(prefiller, job, 0, 1)
    again = claim_next(store, prefiller)
    assert (_indexes(again), _retries(again)) == ([0, 1], [1, 1])
    audit(database_url)


def test_a_dead_holders_shard_that_was_handed_off_comes_back(
    store: Store, database_url: str
) -> None:
    job = make_job(store, 3)
    prefiller, one, two = (worker(store, name) for name in ("prefiller", "one", "two"))
    claim_next(store, prefiller)
    store.holds.take(one, keys(job, 0))
    store.holds.take(two, keys(job, 1, 2))
    assert store.shards.hand_off(prefiller, job, 0, 1)
    _die(store, database_url, one)
    again = claim_next(store, prefiller)
    assert (_indexes(again), _retries(again)) == ([0], [1])
    audit(database_url)


def test_a_retiring_worker_gives_back_without_a_count(store: Store, database_url: str) -> None:
    job = make_job(store, 4)
    me = worker(store)
    claim_next(store, me)
    store.holds.take(me, keys(job, 0))
    store.workers.retire(me)
    store.workers.retire(me)
    assert not store.workers.heartbeat(me)
    assert store.workers.list() == []
    assert [view.state for view in store.workers.list(live_only=False)] == ["retired"]
    assert _retries(claim_next(store, worker(store))) == [0, 0, 0, 0]
    audit(database_url)


def test_a_new_life_ends_the_one_before(store: Store, database_url: str) -> None:
    make_job(store, 4)
    first = worker(store)
    claim_next(store, first)
    second = worker(store)
    name, _, epoch = second.partition("#")
    assert name == "w@host" and int(epoch) > int(first.partition("#")[2])
    assert not store.workers.heartbeat(first)
    assert store.workers.heartbeat(second, {"free_blocks": 7})
    (view,) = store.workers.list()
    assert (view.id, view.epoch, view.stats) == (second, int(epoch), {"free_blocks": 7})
    assert (view.role, view.device, view.info) == ("mixed", "cpu", {"pid": 1})
    assert _retries(claim_next(store, second)) == [1, 1, 1, 1]
    audit(database_url)


def test_requests_that_were_lost_too_often_end_in_error_rows(database_url: str) -> None:
    with Store.open(database_url, max_attempts=3) as store:
        job = make_job(store, 3)
        for _ in range(3):
            me = worker(store)
            claimed = claim_next(store, me)
            assert claimed is not None
            store.results.write(me, [result(job, 0)])
            _die(store, database_url, me)
            audit(database_url)
        view = store.jobs.get(job)
        assert view.state is JobState.COMPLETED
        assert view.counts == Counts(total=3, succeeded=1, failed=2)
        _, *lost = store.results.iterate(job)
        errors = [msgspec.json.decode(row.body, type=RequestOutput).error for row in lost]
        assert [error and (error.code, error.line) for error in errors] == [
            ("batch_failed", 2),
            ("batch_failed", 3),
        ]


def test_attempts_tell_the_story_of_a_shard(store: Store, database_url: str) -> None:
    from sqlalchemy import create_engine, text

    from pdbatch.store.database import parse_url

    make_job(store, 2)
    one = worker(store, "one")
    claimed = claim_next(store, one)
    _die(store, database_url, one)
    two = worker(store, "two")
    claimed = claim_next(store, two)
    assert claimed is not None
    store.shards.give_back(two, claimed.job, claimed.shard, claimed.attempt)
    claimed = claim_next(store, two)
    assert claimed is not None
    finish(store, two, claimed)
    engine = create_engine(parse_url(database_url))
    with engine.connect() as conn:
        rows = conn.execute(
            text("SELECT attempt, worker_id, state FROM attempts ORDER BY attempt")
        ).all()
        assert [tuple(row) for row in rows] == [
            (1, one, "lost"),
            (2, two, "given_back"),
            (3, two, "succeeded"),
        ]
        open_ended = text("SELECT count(*) FROM attempts WHERE ended_at IS NULL")
        assert conn.execute(open_ended).scalar() == 0
    engine.dispose()
    assert isinstance(claimed.job, str) and JobId(claimed.job) == claimed.job
