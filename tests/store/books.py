"""Auditor and small helpers of the tests of the store."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import create_engine, text

from pdbatch.ids import JobId, RequestIndex, WorkerId, request_key
from pdbatch.request import (
    CompletionOutput,
    KVTransfer,
    RequestError,
    RequestOutput,
    RequestSpec,
    StageTimes,
    Usage,
)
from pdbatch.store import ClaimedShard, IngestRow, NewJob, ResultRow, Store
from pdbatch.store.database import parse_url

BODY = msgspec.json.encode(RequestSpec(prompt="Once upon a time"))
BAD = RequestError(code="invalid_request", message="temperature is hot; cool it.", status=400)


def make_job(
    store: Store,
    num_requests: int = 8,
    *,
    shard_size: int = 4,
    rejects: Sequence[int] = (),
    job: NewJob | None = None,
    models: Sequence[str | None] = (None,),
) -> JobId:
    """A job with that many lines, those in `rejects` bad."""
    job_id = store.jobs.create(job or NewJob())
    with store.ingest(job_id, shard_size=shard_size, default_model="m") as ingest:
        for i in range(num_requests):
            bad = i in rejects
            body, error = (None, BAD) if bad else (BODY, None)
            ingest.add(IngestRow(i, f"c{i}", models[i % len(models)], body, error))
    return job_id


def worker(store: Store, name: str = "w") -> WorkerId:
    return store.workers.register(name, "host", "mixed", "m", "cpu", {"pid": 1})


def claim_next(
    store: Store, worker_id: WorkerId, model: str = "m", priority: int = 0
) -> ClaimedShard | None:
    """Publishes and claims one shard."""
    for message in store.shards.take_for_publish(model, priority, 1):
        return store.shards.claim(worker_id, *message)
    return None


def output(job: JobId, index: int) -> RequestOutput:
    return RequestOutput(
        key=request_key(job, index),
        outputs=[CompletionOutput(index=0, text="!", token_ids=[1, 2], finish_reason="stop")],
        usage=Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=1),
        times=StageTimes(prefill_s=0.5, decode_s=0.25, engine_s=0.5),
        transfer=KVTransfer(transport="shm", num_bytes=3_000_000_000),
    )


def result(job: JobId, index: int) -> ResultRow:
    return ResultRow.from_output(output(job, index))


def finish(store: Store, worker_id: WorkerId | None, claimed: ClaimedShard) -> int:
    rows = [result(claimed.job, request.index) for request in claimed.requests]
    return store.results.write(worker_id, rows)


def keys(job: JobId, *indexes: int) -> list[tuple[JobId, RequestIndex]]:
    return [(job, RequestIndex(index)) for index in indexes]


AUDIT = {
    "counters differ from rows": """
        SELECT s.id FROM shards s LEFT JOIN requests r ON r.shard_id = s.id
        LEFT JOIN results x ON x.id = r.id GROUP BY s.id HAVING s.num_requests <> count(r.id)
        OR s.num_succeeded <> sum(CASE WHEN x.status = 'succeeded' THEN 1 ELSE 0 END)
        OR s.num_rejected <> sum(CASE WHEN x.status = 'rejected' THEN 1 ELSE 0 END)
        OR s.num_failed <> sum(CASE WHEN x.status = 'failed' THEN 1 ELSE 0 END)
        OR s.output_tokens <> sum(coalesce(x.output_tokens, 0))""",
    "a hold beside a row": "SELECT h.id FROM holds h JOIN results x ON x.id = h.id",
    "a hold of no live worker": """SELECT h.id FROM holds h WHERE NOT EXISTS
        (SELECT 1 FROM workers w WHERE w.id = h.worker_id AND w.state = 'live')""",
    "claimed by no live worker": """SELECT s.id FROM shards s WHERE s.state = 'claimed'
        AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = s.claimed_by AND w.state = 'live')""",
    "a claimer of a shard that is not claimed": """SELECT id FROM shards
        WHERE (claimed_by IS NOT NULL) <> (state = 'claimed')""",
    "done and not complete, or complete and not done": """SELECT s.id FROM shards s JOIN jobs j
        ON j.no = s.job_no WHERE j.state <> 'validating' AND (s.state = 'done') <>
        (s.num_succeeded + s.num_rejected + s.num_failed = s.num_requests)""",
    "a request that nobody answers for": """SELECT r.id FROM requests r JOIN shards s
        ON s.id = r.shard_id WHERE s.state IN ('handed_off', 'done')
        AND NOT EXISTS (SELECT 1 FROM results x WHERE x.id = r.id)
        AND NOT EXISTS (SELECT 1 FROM holds h WHERE h.id = r.id)""",
    "a job over with an open shard": """SELECT s.id FROM shards s JOIN jobs j ON j.no = s.job_no
        WHERE j.state IN ('completed', 'failed', 'cancelled', 'expired') AND s.state <> 'done'""",
    "a job in progress without an open shard": """SELECT j.no FROM jobs j
        WHERE j.state = 'in_progress' AND NOT EXISTS
        (SELECT 1 FROM shards s WHERE s.job_no = j.no AND s.state <> 'done')""",
    "two running attempts of a shard": """SELECT shard_id FROM attempts WHERE state = 'running'
        GROUP BY shard_id HAVING count(*) > 1""",
    "a running attempt of a shard that waits": """SELECT a.shard_id FROM attempts a
        JOIN shards s ON s.id = a.shard_id WHERE a.state = 'running'
        AND (s.state NOT IN ('claimed', 'handed_off') OR s.attempt <> a.attempt)""",
}


def audit(url: str) -> None:
    """Raises AssertionError, with the keys, where the tables disagree with each other."""
    engine = create_engine(parse_url(url))
    with engine.connect() as conn:
        for what, query in AUDIT.items():
            wrong = conn.execute(text(query)).scalars().all()
            assert not wrong, f"{what}: {wrong[:10]}"
    engine.dispose()


def execute(url: str, sql: str, **values: object) -> None:
    """One statement behind the store's back."""
    engine = create_engine(parse_url(url))
    with engine.begin() as conn:
        conn.execute(text(sql), values)
    engine.dispose()
