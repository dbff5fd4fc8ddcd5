"""The client against a real store, with a worker that is played."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdbatch.client import Client
from pdbatch.config import Settings
from pdbatch.errors import InputError, StoreError, UnknownJob, WaitTimeout
from pdbatch.intake import IngestProgress
from pdbatch.request import RequestError
from pdbatch.states import JobState, ResultStatus

from .conftest import PlayedWorker


def test_a_file_from_submit_to_results(client: Client, worker: PlayedWorker, prompts: Path) -> None:
    job = client.submit(prompts)
    view = job.status()
    assert (view.state, view.input_name) == (JobState.IN_PROGRESS, "prompts.jsonl")
    assert (view.counts.total, view.counts.rejected, view.counts.done) == (10, 1, 1)
    assert job.models == {"smollm2-135m"}
    worker.work()
    view = job.wait(timeout_s=10)
    assert (view.state, view.counts.succeeded) == (JobState.COMPLETED, 9)
    results = list(job.results())
    assert [result.index for result in results] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [result.custom_id for result in results][:4] == ["r0", "r1", "r2", "r4"]
    assert results[3].text == "answer 4"
    assert results[3].output.usage.prompt_tokens == 5
    (error,) = job.errors()
    assert (error.index, error.status) == (3, ResultStatus.REJECTED)
    assert error.error and error.error.code == "invalid_json" and error.error.line == 4
    assert json.loads(results[0].line())["custom_id"] == "r0"
    assert json.loads(error.line())["response"]["status_code"] == 400


@pytest.mark.parametrize("kind", ["iterable", "generator", "stream"])
def test_every_kind_of_source(client: Client, worker: PlayedWorker, kind: str) -> None:
    values: list[Any] = ["a prompt", {"prompt": "another", "max_tokens": 3}, {"prompt": 7}]
    sources: dict[str, Any] = {
        "iterable": values,
        "generator": (value for value in values),
        "stream": io.BytesIO(b"\n".join(json.dumps(value).encode() for value in values)),
    }
    job = client.submit(sources[kind])
    worker.work()
    assert job.wait(10).counts.succeeded == 2
    assert [result.index for result in job.errors()] == [2]


def test_the_jobs_model_goes_over_the_lines_and_they_over_the_default(client: Client) -> None:
    lines = [{"prompt": "a", "model": "org/one"}, {"prompt": "b"}]
    assert client.submit(lines).models == {"org/one", "smollm2-135m"}
    job = client.submit(lines, model="org/two")
    assert job.models == {"org/two"}
    assert job.status().model == "org/two"


def test_progress_of_the_way_in(client: Client) -> None:
    told: list[IngestProgress] = []
    client.submit((f"p{n}" for n in range(2000)), on_progress=told.append)
    assert told[-1].num_rows == 2000
    assert [progress.done for progress in told].count(True) == 1
    assert told[-1].done


def test_results_of_a_running_job_and_following_it(settings: Settings) -> None:
    with Client(Settings(home=settings.home, shard_size=2)) as client:
        worker = PlayedWorker(settings)
        job = client.submit([f"p{n}" for n in range(6)])
        worker.work(shards=1)
        assert [result.index for result in job.results()] == [0, 1]
        followed = job.results(follow=True)
        assert [next(followed).index, next(followed).index] == [0, 1]
        thread = threading.Thread(target=worker.work)
        thread.start()
        assert [result.index for result in followed] == [2, 3, 4, 5]
        thread.join()
        worker.close()


def test_following_keeps_order_when_later_rows_come_first(settings: Settings) -> None:
    with Client(Settings(home=settings.home, shard_size=1)) as client:
        worker = PlayedWorker(settings)
        job = client.submit(["a", "b", "c"])
        store = client._store
        messages = store.shards.take_for_publish("smollm2-135m", 0, 3)
        claims = [store.shards.claim(worker.worker, *message) for message in messages]
        by_index = {claim.requests[0].index: claim for claim in claims if claim}
        store.results.write(worker.worker, [worker._row(job.id, 2, "last")])
        assert [result.index for result in job.results()] == [2]
        followed: Iterator[Any] = job.results(follow=True)
        rows = [worker._row(job.id, index, "x") for index in sorted(by_index)[:2]]
        timer = threading.Timer(0.1, store.results.write, (worker.worker, rows))
        timer.start()
        assert [result.index for result in followed] == [0, 1, 2]
        worker.close()


def test_waiting_too_long_and_for_nothing(client: Client, prompts: Path) -> None:
    job = client.submit(prompts)
    with pytest.raises(WaitTimeout, match="1 of 10 requests done"):
        job.wait(timeout_s=0.1)
    for call in (client.status, client.wait, client.cancel):
        with pytest.raises(UnknownJob):
            call("job_none")
    with pytest.raises(UnknownJob):
        list(client.results("job_none"))


def test_cancel_keeps_what_is_ready(settings: Settings) -> None:
    with Client(Settings(home=settings.home, shard_size=2)) as client:
        worker = PlayedWorker(settings)
        job = client.submit([f"p{n}" for n in range(6)])
        worker.work(shards=1)
        assert job.cancel() is JobState.CANCELLED
        assert [result.index for result in job.results(follow=True)] == [0, 1]
        assert {result.output.error.code for result in job.errors() if result.output.error} == {
            "batch_cancelled"
        }
        worker.close()


def test_failed_requests_have_their_own_iterator(client: Client, worker: PlayedWorker) -> None:
    job = client.submit(["a", "b", {"prompt": 1}, "d"])
    failed = RequestError(code="batch_failed", message="It failed.")
    worker.work(lambda index: failed if index == 0 else "fine")
    assert job.wait(10).counts.failed == 1
    assert [(e.index, e.status.value) for e in job.errors()] == [(0, "failed"), (2, "rejected")]
    assert [e.index for e in job.errors(follow=True)] == [0, 2]


def test_a_source_that_cannot_be_read_leaves_no_job(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        client.submit(tmp_path / "nowhere.jsonl")
    assert client.jobs() == []


def test_a_source_that_breaks_fails_its_job(client: Client) -> None:
    def source() -> Iterator[str]:
        yield "first"
        raise RuntimeError("the pipe broke")

    with pytest.raises(RuntimeError, match="the pipe broke"):
        client.submit(source())
    (view,) = client.jobs()
    assert view.state is JobState.FAILED
    assert "the pipe broke" in (view.error or "")


def test_an_empty_source_is_a_completed_job(client: Client) -> None:
    assert client.submit([]).wait(10).state is JobState.COMPLETED


def test_a_database_that_was_named_is_not_made_in_silence(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        Client(home=tmp_path, database_url=f"sqlite:///{tmp_path}/other.db")
    assert "db upgrade" in (caught.value.remedy or "")


def test_keywords_go_over_settings(settings: Settings, tmp_path: Path) -> None:
    with Client(settings, model="org/mine") as client:
        assert client.settings.model == "org/mine"
        assert client.settings.home == settings.home
