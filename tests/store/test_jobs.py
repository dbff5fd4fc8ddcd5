"""Jobs from ingest to their end."""

from __future__ import annotations

import threading

import msgspec
import pytest

from pdbatch.errors import IllegalTransition, UnknownJob
from pdbatch.ids import JobId
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.states import JobState, ResultStatus
from pdbatch.store import Counts, IngestRow, NewJob, Store, TokenCounts

from .books import BAD, BODY, audit, claim_next, execute, finish, make_job, result, worker


def _codes(store: Store, job: JobId) -> list[str]:
    bodies = [
        msgspec.json.decode(row.body, type=RequestOutput) for row in store.results.iterate(job)
    ]
    return [body.error.code if body.error else "" for body in bodies]


def test_a_job_as_it_was_asked_for_is_read_back(store: Store) -> None:
    wanted = NewJob(
        model="x",
        priority=3,
        weight=2,
        input_name="in.jsonl",
        metadata={"who": "né\x00e \ud800"},
        endpoint="/v1/completions",
        deadline_at=9e9,
    )
    job = store.jobs.create(wanted)
    view = store.jobs.get(job)
    assert (view.id, view.state) == (job, JobState.VALIDATING)
    assert (view.model, view.priority, view.weight) == ("x", 3, 2)
    assert (view.input_name, dict(view.metadata)) == ("in.jsonl", {"who": "né\x00e \ud800"})
    assert view.deadline_at == 9e9
    assert abs(view.created_at - store.now()) < 60
    assert view.counts == Counts()


def test_counts_tokens_and_times_roll_up_from_shards(store: Store, database_url: str) -> None:
    job = make_job(store, 10, rejects=[2, 7])
    assert store.jobs.get(job).counts == Counts(total=10, rejected=2)
    me = worker(store)
    while claimed := claim_next(store, me):
        assert finish(store, me, claimed) == len(claimed.requests)
    view = store.jobs.get(job)
    assert view.state is JobState.COMPLETED
    assert view.counts == Counts(total=10, succeeded=8, rejected=2)
    assert view.counts.done == 10
    assert view.tokens == TokenCounts(prompt=40, cached=8, output=16)
    assert (view.times.prefill_s, view.times.decode_s, view.times.engine_s) == (4.0, 2.0, 4.0)
    assert view.transfer_bytes == 24_000_000_000, "more than 32 bits"
    assert view.started_at is not None and view.finished_at is not None
    assert view.created_at <= view.started_at <= view.finished_at
    audit(database_url)


def test_jobs_are_listed_newest_first_and_by_state(store: Store) -> None:
    first, second = make_job(store), make_job(store)
    empty = make_job(store, 0)
    assert [view.id for view in store.jobs.list()] == [empty, second, first]
    assert [view.id for view in store.jobs.list(2)] == [empty, second]
    assert [view.id for view in store.jobs.list(states={JobState.COMPLETED})] == [empty]
    assert store.jobs.states([first, empty, JobId("job_none")]) == {
        first: JobState.IN_PROGRESS,
        empty: JobState.COMPLETED,
    }


@pytest.mark.parametrize("num_requests", [0, 1, 9])
def test_a_job_with_nothing_to_run_completes_when_activated(
    store: Store, database_url: str, num_requests: int
) -> None:
    job = make_job(store, num_requests, rejects=range(num_requests))
    view = store.jobs.get(job)
    assert view.state is JobState.COMPLETED
    assert view.counts == Counts(total=num_requests, rejected=num_requests)
    assert view.finished_at is not None
    assert store.shards.pending_queues() == []
    audit(database_url)


def test_unknown_jobs_are_refused_by_name(store: Store) -> None:
    nobody = JobId("job_nobody")
    for call in (store.jobs.get, store.jobs.cancel, store.jobs.activate):
        with pytest.raises(UnknownJob, match="job_nobody"):
            call(nobody)
    with pytest.raises(UnknownJob):
        next(store.results.iterate(nobody))
    with pytest.raises(UnknownJob):
        store.results.get(nobody, 0)


def test_lines_go_into_shards_of_one_model(store: Store, database_url: str) -> None:
    make_job(store, 20, shard_size=3, models=["a", "b", None, "a"])
    depths = {(d.model, d.priority): d.num_shards for d in store.shards.pending_queues()}
    assert depths == {("a", 0): 4, ("b", 0): 2, ("m", 0): 2}
    seen = []
    me = worker(store)
    while claimed := claim_next(store, me, "a"):
        assert 0 < len(claimed.requests) <= 3
        seen += [request.index for request in claimed.requests]
        assert claimed.requests[0].body == BODY
    assert seen == [i for i in range(20) if i % 4 in (0, 3)]
    audit(database_url)


def test_the_jobs_model_goes_before_the_lines(store: Store) -> None:
    make_job(store, 4, job=NewJob(model="served"), models=["a", "b"])
    assert [d.model for d in store.shards.pending_queues()] == ["served"]


def test_later_lines_with_a_used_custom_id_are_rejected(store: Store, database_url: str) -> None:
    job = store.jobs.create(NewJob())
    names = ["a", "b", "a", None, None, "c", "a", "b", "bad"]
    with store.ingest(job, shard_size=2, default_model="m") as ingest:
        for i, name in enumerate(names):
            bad = i in (1, 6)
            row = (None, BAD) if bad else (BODY, None)
            ingest.add(IngestRow(i, name, None, *row, line=10 * i + 1))
    rows = list(store.results.iterate(job))
    assert [row.index for row in rows] == [1, 2, 6, 7]
    assert {row.status for row in rows} == {ResultStatus.REJECTED}
    errors = [msgspec.json.decode(row.body, type=RequestOutput).error for row in rows]
    assert [error and error.code for error in errors] == [
        "invalid_request",
        "duplicate_custom_id",
        "invalid_request",
        "duplicate_custom_id",
    ]
    assert errors[1] is not None
    assert (errors[1].line, errors[1].param, errors[1].status) == (21, "custom_id", 400)
    assert store.jobs.get(job).counts == Counts(total=9, rejected=4)
    audit(database_url)


def test_groups_of_lines_are_many_and_text_is_made_storable(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbatch.store.ingest._ROWS_AT_ONCE", 7)
    monkeypatch.setattr("pdbatch.store.ingest._BYTES_AT_ONCE", 3000)
    job = store.jobs.create(NewJob())
    spec = RequestSpec(endpoint="/v1/chat/completions", messages=[{"content": "\x00"}])
    with store.ingest(job, shard_size=5, default_model="m\x00") as ingest:
        for i in range(50):
            body = b'{"prompt":"' + b"x" * 2000 + b'"}' if i % 9 == 0 else msgspec.json.encode(spec)
            ingest.add(IngestRow(i, f"{i}\x00\ud800", None, body))
    me = worker(store)
    while claimed := claim_next(store, me, "m�"):
        finish(store, me, claimed)
    rows = list(store.results.iterate(job))
    assert [row.index for row in rows] == list(range(50))
    assert rows[1].custom_id is not None and rows[1].custom_id.startswith("1�")
    assert (rows[0].endpoint, rows[1].endpoint) == ("/v1/completions", "/v1/chat/completions")
    assert store.jobs.get(job).state is JobState.COMPLETED
    audit(database_url)


def test_rows_out_of_order_or_without_content_are_refused(store: Store) -> None:
    job = store.jobs.create(NewJob())
    ingest = store.ingest(job, default_model="m")
    with pytest.raises(ValueError, match="next row has index 0, not 1"):
        ingest.add(IngestRow(1, None, None, BODY))
    with pytest.raises(ValueError, match="either a body or a reject"):
        ingest.add(IngestRow(0, None, None, None))
    with pytest.raises(ValueError, match="either a body or a reject"):
        ingest.add(IngestRow(0, None, None, BODY, BAD))


def test_an_exception_while_reading_fails_the_job_and_ends_its_lines(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbatch.store.ingest._ROWS_AT_ONCE", 3)
    job = store.jobs.create(NewJob())
    with pytest.raises(OSError, match="torn"), store.ingest(job, default_model="m") as ingest:
        for i in range(7):
            ingest.add(IngestRow(i, None, None, BODY))
        raise OSError("the tape is torn")
    view = store.jobs.get(job)
    assert view.state is JobState.FAILED
    assert view.error == "OSError: the tape is torn"
    assert view.counts == Counts(total=6, failed=6)
    assert _codes(store, job) == ["batch_failed"] * 6
    assert store.jobs.fail(job, "again") is JobState.FAILED
    audit(database_url)


def test_a_job_in_progress_cannot_fail_as_a_whole(store: Store) -> None:
    with pytest.raises(IllegalTransition, match="from in_progress to failed"):
        store.jobs.fail(make_job(store), "no")


def test_cancelling_gives_the_rest_rows_and_keeps_results(store: Store, database_url: str) -> None:
    job = make_job(store, 300, shard_size=2, rejects=[5])
    me = worker(store)
    ready, running = claim_next(store, me), claim_next(store, me)
    assert ready is not None and running is not None
    finish(store, me, ready)
    store.holds.take(me, [(job, running.requests[0].index)])
    assert store.jobs.cancel(job) is JobState.CANCELLED
    view = store.jobs.get(job)
    assert (view.state, view.counts.done) == (JobState.CANCELLED, 300)
    assert view.counts == Counts(total=300, succeeded=2, rejected=1, failed=297)
    assert _codes(store, job).count("batch_cancelled") == 297
    assert finish(store, me, running) == 0  # too late: the row is there
    assert store.jobs.cancel(job) is JobState.CANCELLED
    assert store.shards.pending_queues() == []
    audit(database_url)


def test_a_completed_job_stays_completed_when_cancelled(store: Store) -> None:
    assert store.jobs.cancel(make_job(store, 0)) is JobState.COMPLETED


def test_a_job_cancelled_while_it_is_read_takes_no_more_lines(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdbatch.store.ingest._ROWS_AT_ONCE", 2)
    job = store.jobs.create(NewJob())
    with (
        pytest.raises(IllegalTransition, match="cancelled"),
        store.ingest(job, default_model="m") as ingest,
    ):
        for i in range(9):
            if i == 5:
                assert store.jobs.cancel(job) is JobState.CANCELLED
            ingest.add(IngestRow(i, None, None, BODY))
    view = store.jobs.get(job)
    assert (view.state, view.counts) == (JobState.CANCELLED, Counts(total=4, failed=4))
    audit(database_url)


def test_one_shard_is_cancelled_alone(store: Store, database_url: str) -> None:
    job = make_job(store, 8)
    assert store.shards.cancel(job, 0) == 4
    assert store.shards.cancel(job, 0) == 0
    assert store.jobs.get(job).state is JobState.IN_PROGRESS
    assert store.shards.cancel(job, 1) == 4
    assert store.jobs.get(job).state is JobState.COMPLETED
    assert _codes(store, job) == ["batch_cancelled"] * 8
    audit(database_url)


def test_a_job_past_its_deadline_expires(store: Store, database_url: str) -> None:
    job = make_job(store, 8, job=NewJob(deadline_at=store.now() + 3600))
    me = worker(store)
    claimed = claim_next(store, me)
    assert claimed is not None
    finish(store, me, claimed)
    assert store.jobs.sweep() == []
    execute(database_url, "UPDATE jobs SET deadline_at = 1")
    assert store.jobs.sweep() == [job]
    view = store.jobs.get(job)
    assert (view.state, view.counts) == (JobState.EXPIRED, Counts(total=8, succeeded=4, failed=4))
    assert _codes(store, job)[4:] == ["batch_expired"] * 4
    assert store.jobs.sweep() == []
    audit(database_url)


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_an_ending_that_was_interrupted_is_finished_by_the_sweep(
    store: Store, database_url: str, ending: str
) -> None:
    job = make_job(store, 8)
    queued = store.shards.take_for_publish("m", 0, 1)
    state = "cancelling" if ending == "cancelled" else "in_progress"
    execute(database_url, "UPDATE jobs SET ending = :e, state = :s", e=ending, s=state)
    assert store.shards.take_for_publish("m", 0, 9) == []
    assert store.shards.claim(worker(store), *queued[0]) is None
    assert store.jobs.sweep() == [job]
    assert store.jobs.get(job).state == ending
    assert store.results.write(None, [result(job, 0)]) == 0
    audit(database_url)


def test_a_job_whose_submitter_was_killed_fails(store: Store, database_url: str) -> None:
    job = store.jobs.create(NewJob())
    ingest = store.ingest(job, shard_size=4, default_model="m")  # never left
    for index in range(5_000):
        ingest.add(IngestRow(index, None, None, BODY, None))
    assert store.jobs.sweep(60) == [], "it was heard of just now"
    execute(database_url, "UPDATE jobs SET heard_at = heard_at - 61")
    assert store.jobs.sweep() == [], "a reconciler that slept says nothing of silence"
    store.jobs.hear(job)
    assert store.jobs.sweep(60) == []
    execute(database_url, "UPDATE jobs SET heard_at = heard_at - 61")
    assert store.jobs.sweep(60) == [job]
    view = store.jobs.get(job)
    assert view.state is JobState.FAILED
    assert view.error == "its submitter has not been heard of for 60 seconds"
    assert _codes(store, job) == ["batch_failed"] * 5_000
    with pytest.raises(IllegalTransition):
        for index in range(5_000, 10_000):
            ingest.add(IngestRow(index, None, None, BODY, None))
    audit(database_url)


def test_a_submitter_whose_lines_come_slowly_is_heard_of(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Semaphore(0)
    hear = store.jobs.hear

    def note(job: JobId) -> None:
        hear(job)
        heard.release()

    monkeypatch.setattr("pdbatch.store.ingest._HEARTBEAT_S", 0.01)
    monkeypatch.setattr(store.jobs, "hear", note)
    with store.ingest(store.jobs.create(NewJob()), shard_size=4, default_model="m"):
        assert heard.acquire(timeout=20)
        assert heard.acquire(timeout=20)
