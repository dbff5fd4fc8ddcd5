"""One prompt by Celery's own means: `generate.delay("…", max_tokens=64).get(timeout=…)`.

1. A worker takes the message; `start` puts the request into the store as a job of one line, whose
   id follows from the task's: a message that comes twice finds the same job.
2. The job runs like every other, wherever there is room, before those of normal priority.
3. `outcome` of its row is what the task returns, or raises.

In code, import the functions from `tasks.generate`; `from tasks import generate` is the task.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pdbatch.config import Settings
from pdbatch.errors import PdbatchError
from pdbatch.formats import ParsedRequest, Reject, decode_output, encode_spec, parse_request
from pdbatch.ids import JobId
from pdbatch.queues import GENERATE_TASK, canonical_model
from pdbatch.states import JobState, ResultStatus
from pdbatch.store import IngestRow, NewJob, Store, StoredResult
from tasks import handover
from tasks.app import app

PRIORITY = -1
"""Somebody waits for the answer."""


class GenerateFailed(PdbatchError):
    """The request has no output: every attempt failed, or it was cancelled."""


class GenerateRejected(GenerateFailed):
    """The arguments are wrong, or the model cannot take the prompt; trying again is no use."""

    exit_code = 2


@app.task(name=GENERATE_TASK, bind=True)  # type: ignore[untyped-decorator]
def generate(
    self: Any,
    prompt: str | list[int] | None = None,
    *,
    messages: list[dict[str, Any]] | None = None,
    max_tokens: int | None = None,
    model: str | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """The output for one prompt (text or token ids), or for the messages of a chat.

    `sampling` takes the fields of a line of input: temperature, top_p, n, seed, stop, …;
    `max_tokens` defaults as there (256 for a prompt). `model` defaults to the worker's.
    Returns `text` (of the first output), `texts`, `token_ids`, `finish_reason`, `usage`, `job`.
    Raises GenerateRejected, GenerateFailed.
    """
    outputs: dict[str, Any] = handover.fetch(self.request.id)
    return outputs


def job_of(task_id: str) -> JobId:
    """The job of a task: the same whenever its message comes."""
    return JobId("job_" + hashlib.sha256(task_id.encode()).hexdigest()[:24])


def start(
    store: Store, settings: Settings, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> JobId:
    """The task's job, made and activated unless it was before. Safe to call again after a crash,
    and in two workers at once. Raises GenerateRejected for wrong arguments, StoreError."""
    job = job_of(task_id)
    if store.jobs.states([job]).get(job, JobState.VALIDATING) is not JobState.VALIDATING:
        return job
    parsed = _parse(args, kwargs, settings.max_line_bytes)
    default_model = canonical_model(settings.model)
    model = canonical_model(parsed.model) if parsed.model else default_model
    wanted = NewJob(
        model=model,
        priority=PRIORITY,
        input_name="generate",
        metadata={"celery_task": task_id},
    )
    store.jobs.create(wanted, id=job)
    try:
        with store.ingest(job, shard_size=1, default_model=default_model) as ingest:
            spec = parsed.spec
            body = encode_spec(spec)
            ingest.add(IngestRow(0, task_id, model, body, None, 1, spec.endpoint))
    except PdbatchError:
        if store.jobs.states([job]).get(job) in (None, JobState.VALIDATING, JobState.FAILED):
            raise
    return job


def outcome(row: StoredResult | None) -> dict[str, Any]:
    """What the task returns for the row of its request. Raises GenerateRejected or GenerateFailed
    for a row without output, GenerateFailed for a job that ended without its row."""
    if row is None:
        raise GenerateFailed("the job ended without a result for its request")
    output = decode_output(row.body)
    if (error := output.error) is not None:
        kind = GenerateRejected if row.status is ResultStatus.REJECTED else GenerateFailed
        raise kind(f"{error.code}: {error.message}")
    first, usage = output.outputs[0], output.usage
    return {
        "text": first.text,
        "texts": [each.text for each in output.outputs],
        "token_ids": first.token_ids,
        "finish_reason": first.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "job": row.job,
    }


def _parse(args: Sequence[Any], kwargs: Mapping[str, Any], max_line_bytes: int) -> ParsedRequest:
    """The request of a task's arguments, by the rules of a line in the plain form."""
    try:
        fields = dict(_signature().bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise GenerateRejected(f"generate: {error}") from None
    fields |= fields.pop("sampling", {})
    if foreign := sorted(fields.keys() & _OF_LINES):
        raise GenerateRejected(f"generate takes no {foreign[0]}; leave it out")
    given = {name: value for name, value in fields.items() if value is not None}
    parsed = parse_request(given, max_line_bytes=max_line_bytes)
    if isinstance(parsed, Reject):
        field = f"{parsed.error.param}: " if parsed.error.param else ""
        raise GenerateRejected(f"{parsed.error.code}: {field}{parsed.error.message}")
    return parsed


_OF_LINES = frozenset({"id", "custom_id", "method", "url", "body", "sampling"})


@cache
def _signature() -> inspect.Signature:
    """Of the task; looked at late, because a task reads its application's settings."""
    return inspect.signature(generate.run)
