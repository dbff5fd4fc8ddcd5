"""`generate` without a worker: from arguments to a job, from its row to an answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from celery import Celery

from pdbatch.config import Settings
from pdbatch.formats import decode_spec
from pdbatch.ids import JobId, request_key
from pdbatch.request import CompletionOutput, RequestError, RequestOutput, Usage
from pdbatch.states import JobState
from pdbatch.store import NewJob, ResultRow, Store
from tasks.generate import GenerateFailed, GenerateRejected, job_of, outcome, start
from tasks.handover import WrongPool


def _claim(store: Store, model: str = "m") -> Any:
    worker = store.workers.register("w", "host", "mixed", model)
    (message,) = store.shards.take_for_publish(model, -1, 10)
    claimed = store.shards.claim(worker, *message)
    assert claimed is not None
    return claimed


def test_a_prompt_becomes_a_job_of_one_line(store: Store, settings: Settings) -> None:
    job = start(store, settings, "task-1", ("Hello",), {"max_tokens": 7, "temperature": 0})
    view = store.jobs.get(job)
    assert job == job_of("task-1") and view.state is JobState.IN_PROGRESS
    assert (view.priority, view.counts.total, view.input_name) == (-1, 1, "generate")
    assert view.metadata == {"celery_task": "task-1"}
    spec = decode_spec(_claim(store).requests[0].body)
    assert (spec.prompt, spec.sampling.max_tokens, spec.sampling.temperature) == ("Hello", 7, 0)


def test_messages_and_a_model_of_ones_own(store: Store, settings: Settings) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    start(store, settings, "task-1", (), {"messages": messages, "model": "other"})
    spec = decode_spec(_claim(store, "other").requests[0].body)
    assert spec.messages == messages and spec.endpoint == "/v1/chat/completions"


def test_the_same_task_finds_the_same_job(store: Store, settings: Settings) -> None:
    jobs = {start(store, settings, "task-1", ("Hello",), {}) for _ in range(3)}
    assert len(jobs) == 1 and len(store.jobs.list()) == 1
    assert store.jobs.get(jobs.pop()).counts.total == 1
    assert start(store, settings, "task-2", ("Hello",), {}) == job_of("task-2")


@pytest.mark.parametrize("with_row", [False, True])
def test_a_start_that_was_cut_off_is_finished(
    store: Store, settings: Settings, with_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        """Stands for the end of the process."""

    def cut(*_: Any, **__: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(type(store.jobs), "fail", cut)
        patch.setattr(
            type(store.jobs) if with_row else Store, "activate" if with_row else "ingest", cut
        )
        with pytest.raises(Cut):
            start(store, settings, "task-1", ("Hello",), {})
    assert store.jobs.get(job_of("task-1")).state is JobState.VALIDATING
    job = start(store, settings, "task-1", ("Hello",), {})
    assert store.jobs.get(job).state is JobState.IN_PROGRESS
    assert len(_claim(store).requests) == 1


def test_two_workers_at_once(store: Store, settings: Settings, database_url: str) -> None:
    barrier, found = threading.Barrier(4), []

    def run(number: int) -> None:
        with Store.open(database_url) as own:
            for task in range(10):
                barrier.wait(30)
                found.append(start(own, settings, f"task-{task}", ("Hello",), {}))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 40 and len(set(found)) == 10
    assert all(store.jobs.get(job).counts.total == 1 for job in set(found))
    assert all(store.jobs.get(job).state is JobState.IN_PROGRESS for job in set(found))


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {}, "prompt"),
        (("a", "b"), {}, "positional"),
        (("a",), {"prompt": "b"}, "prompt"),
        (("a",), {"messages": [{"role": "user", "content": "x"}]}, "both given"),
        (("a",), {"temperature": 1000}, "temperature"),
        (("a",), {"tempratur": 1}, "tempratur"),
        (("a",), {"custom_id": "x"}, "custom_id"),
        (("a",), {"body": {}}, "body"),
        (("",), {}, "empty"),
    ],
)
def test_wrong_arguments_are_told(
    store: Store, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(GenerateRejected, match=reason):
        start(store, settings, "task-1", args, kwargs)
    assert store.jobs.list() == []


def _row(store: Store, settings: Settings, **given: Any) -> Any:
    job = start(store, settings, "task-1", ("Hello",), {})
    output = RequestOutput(key=request_key(job, 0), **given)
    assert store.results.write(None, [ResultRow.from_output(output)]) == 1
    return store.results.get(job, 0)


def test_an_answer(store: Store, settings: Settings) -> None:
    outputs = [
        CompletionOutput(index=i, text=f"t{i}", token_ids=[i, 5], finish_reason="stop")
        for i in range(2)
    ]
    usage = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1)
    answer = outcome(_row(store, settings, outputs=outputs, usage=usage))
    assert answer == {
        "text": "t0",
        "texts": ["t0", "t1"],
        "token_ids": [0, 5],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 1},
        "job": job_of("task-1"),
    }


@pytest.mark.parametrize(("status", "kind"), [(400, GenerateRejected), (None, GenerateFailed)])
def test_an_error_keeps_its_kind_and_message_through_the_back_end(
    store: Store, settings: Settings, app: Celery, status: int | None, kind: type[Exception]
) -> None:
    error = RequestError(code="some_code", message="It broke; mend it.", status=status)
    with pytest.raises(kind) as raised:
        outcome(_row(store, settings, error=error))
    app.backend.store_result("some-id", raised.value, "FAILURE")
    with pytest.raises(kind, match="some_code: It broke; mend it") as told:
        app.AsyncResult("some-id").get(timeout=5)
    assert type(told.value) is kind


def test_a_cancelled_job_is_a_failure(store: Store, settings: Settings) -> None:
    job = start(store, settings, "task-1", ("Hello",), {})
    store.jobs.cancel(job)
    with pytest.raises(GenerateFailed, match="batch_cancelled"):
        outcome(store.results.get(job, 0))
    with pytest.raises(GenerateFailed, match="without a result"):
        outcome(None)


def test_another_pool_says_which_worker_is_needed() -> None:
    import tasks

    with pytest.raises(WrongPool, match="pdbatch worker"):
        tasks.generate("Hello")
    with pytest.raises(WrongPool, match="pdbatch worker"):
        tasks.prefill(job="job_x", shard=0, attempt=1)


def test_a_given_job_id_is_made_once(store: Store) -> None:
    given = JobId("job_" + "0" * 24)
    assert store.jobs.create(NewJob(input_name="first"), id=given) == given
    assert store.jobs.create(NewJob(input_name="second"), id=given) == given
    assert [(view.id, view.input_name) for view in store.jobs.list()] == [(given, "first")]
