"""Flower as a process: our page first, its own pages beside it, JSON, nothing but the loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from pdbatch.config import Settings
from pdbatch.ids import JobId, request_key
from pdbatch.request import CompletionOutput, RequestOutput, Usage
from pdbatch.store import IngestRow, JobView, NewJob, ResultRow, Store
from tasks.flower.rows import job_row, read_page


def make_job(store: Store, name: str, num_requests: int = 4, num_done: int = 1) -> JobId:
    job = store.jobs.create(NewJob(input_name=name, model="m"))
    with store.ingest(job, shard_size=2, default_model="m") as ingest:
        for index in range(num_requests):
            ingest.add(IngestRow(index, None, None, b'{"prompt":"Once"}', None))
    output = CompletionOutput(index=0, text="!", token_ids=[1], finish_reason="stop")
    usage = Usage(prompt_tokens=5, completion_tokens=1, cached_tokens=2)
    outputs = [
        RequestOutput(key=request_key(job, index), outputs=[output], usage=usage)
        for index in range(num_done)
    ]
    store.results.write(None, [ResultRow.from_output(each) for each in outputs])
    return job


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


@pytest.fixture
def open_api() -> str:
    """Whether Flower's API is open to everybody who reaches it."""
    return "true"


@pytest.fixture
def flower(store: Store, settings: Settings, open_api: str) -> Iterator[str]:
    """The address of a Flower that answers."""
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", "flower", "--port", str(port)],
        env={**os.environ, **settings.to_env(), "FLOWER_UNAUTHENTICATED_API": open_api},
        stderr=subprocess.PIPE,
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                get(f"{url}/")
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode is not None


def test_the_first_page_lists_jobs_and_the_api_gives_them(store: Store, flower: str) -> None:
    job = make_job(store, "<script>alert(1)</script>.jsonl")
    worker = store.workers.register("w1", "host", "decode", "m", "cpu", {})
    store.workers.heartbeat(worker, {"free_blocks": 7, "total_blocks": 9, "running": 3})
    page = get(f"{flower}/")
    assert job in page and "w1" in page and "decode" in page
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    found = json.loads(get(f"{flower}/api/jobs"))
    (row,), (seen,) = found["jobs"], found["workers"]
    assert (row["id"], row["total"], row["succeeded"], row["percent"]) == (job, 4, 1, 25.0)
    assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (5, 2, 1)
    assert (seen["name"], seen["free_blocks"], seen["running"]) == ("w1", 7, 3)


def test_flowers_own_pages_and_api_are_there(flower: str) -> None:
    assert "Workers" in get(f"{flower}/workers")
    assert "Tasks" in get(f"{flower}/tasks")
    assert json.loads(get(f"{flower}/api/workers")) == {}


@pytest.mark.parametrize("open_api", ["false"])
def test_the_api_is_closed_unless_somebody_opens_it(flower: str) -> None:
    for path in ("/api/jobs", "/api/workers"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(flower + path)


def test_limits_and_nonsense(store: Store, flower: str) -> None:
    jobs = [make_job(store, f"{number}.jsonl") for number in range(3)]
    found = json.loads(get(f"{flower}/api/jobs?limit=2"))["jobs"]
    assert [row["id"] for row in found] == [jobs[2], jobs[1]]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(f"{flower}/api/jobs?limit=many")


def test_rows_of_jobs(store: Store) -> None:
    job = make_job(store, "a.jsonl")
    view: JobView = store.jobs.get(job)
    assert view.started_at is not None
    row = job_row(view, view.started_at + 10)
    assert (row.requests_per_s, row.remaining_s, row.elapsed_s) == (0.1, 30.0, 10.0)
    fresh = store.jobs.get(store.jobs.create(NewJob()))
    row = job_row(fresh, store.now())
    assert (row.percent, row.requests_per_s, row.remaining_s, row.model) == (
        0,
        None,
        None,
        "by line",
    )
    rows, workers = read_page(store)
    assert len(rows) == 2 and workers == []
