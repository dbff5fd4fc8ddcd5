"""Jobs from Python: submit, watch, read.

    with Client() as client:
        job = client.submit("prompts.jsonl")
        client.wait(job)
        for result in client.results(job):
            print(result.custom_id, result.text)

A client talks to the database alone, so it needs no Redis and works while the cluster is
down; jobs start when workers are there. It may be shared among threads. It imports neither
torch nor Celery.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pdbatch.config import Settings
from pdbatch.errors import WaitTimeout
from pdbatch.ids import JobId
from pdbatch.intake import IngestProgress, take_in
from pdbatch.job import Job
from pdbatch.local.database import open_store
from pdbatch.result import Result
from pdbatch.states import TERMINAL_JOB_STATES, JobState, ResultStatus
from pdbatch.store import JobView, NewJob, WorkerView

Source = str | os.PathLike[str] | BinaryIO | Iterable[str | Mapping[str, Any]]
"""A path of JSONL, an open binary stream of it, or prompts (str) and requests (dict)."""

_SHORTEST_POLL_S = 0.05
_LONGEST_POLL_S = 0.5


class Client:
    """The jobs of one installation."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        home: str | os.PathLike[str] | None = None,
        database_url: str | None = None,
        model: str | None = None,
    ) -> None:
        """Opens the database; the keywords go over `settings`, which default to `Settings.load()`.

        Raises ConfigError; StoreError when the database is missing or at another revision (the
        embedded one is made and upgraded here).
        """
        given = {"home": home and str(home), "database_url": database_url, "model": model}
        flags = {key: value for key, value in given.items() if value is not None}
        if settings is None:
            self.settings = Settings.load(flags)
        else:
            self.settings = replace(settings, **flags)  # type: ignore[arg-type]
        self._store = open_store(self.settings)

    def submit(
        self,
        source: Source,
        *,
        model: str | None = None,
        priority: int = 0,
        weight: int = 1,
        input_name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
        on_progress: Callable[[IngestProgress], None] | None = None,
    ) -> Job:
        """Takes a batch in and returns its job, which runs as soon as workers have room.

        The source is read once, in constant memory; `on_progress` is called about five times
        a second and at the end. A line that is wrong becomes an error row. `model` serves the
        whole job; without it the lines' own decides, and `settings.model` where they have none.
        A smaller `priority` (0 is normal) runs first; among equals a job gets a share by
        `weight`. `deadline_s` after now, what has no result expires.

        Raises InputError when the source cannot be read at all, StoreError.
        """
        name = input_name if input_name is not None else _name_of(source)
        deadline_at = None if deadline_s is None else self._store.now() + deadline_s
        wanted = NewJob(
            model=model,
            priority=priority,
            weight=weight,
            input_name=name,
            metadata=metadata or {},
            deadline_at=deadline_at,
        )
        job, progress = take_in(self._store, self.settings, source, wanted, on_progress)
        return Job(self, job, progress.models)

    def job(self, job: JobId | str) -> Job:
        """The handle of a job by its id. Raises UnknownJob."""
        return Job(self, self.status(job).id)

    def jobs(self, limit: int = 50, states: Collection[JobState] | None = None) -> list[JobView]:
        """The newest jobs first; of these states only, where some are given."""
        return self._store.jobs.list(limit, states)

    def status(self, job: Job | JobId | str) -> JobView:
        """The job as it stands: state, counts, tokens, times. Raises UnknownJob."""
        return self._store.jobs.get(job_id(job))

    def wait(
        self,
        job: Job | JobId | str,
        timeout_s: float | None = None,
        on_progress: Callable[[JobView], None] | None = None,
    ) -> JobView:
        """Waits until the job has ended, in whichever way; returns how.

        `on_progress` is called after each look, at most every 0.5 s. Raises WaitTimeout when
        `timeout_s` is over (the job goes on), UnknownJob.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poll_s = _SHORTEST_POLL_S
        while True:
            view = self.status(job)
            if on_progress:
                on_progress(view)
            if view.state in TERMINAL_JOB_STATES:
                return view
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(
                    f"{view.id} is {view.state} after {timeout_s:g} s:"
                    f" {view.counts.done} of {view.counts.total} requests done",
                    remedy="Wait longer, or see `pdbatch status` for what runs.",
                )
            time.sleep(poll_s if deadline is None else min(poll_s, timeout_s or poll_s))
            poll_s = min(poll_s * 1.5, _LONGEST_POLL_S)

    def results(self, job: Job | JobId | str, *, follow: bool = False) -> Iterator[Result]:
        """The requests that succeeded, in the input's order.

        Those that are ready now; with `follow`, each as soon as all before it are ready, until
        the job has ended. Requests that failed are left out (`Result.index` tells the
        position) and found in `errors`. Raises UnknownJob.
        """
        return self._rows(job_id(job), (ResultStatus.SUCCEEDED,), follow)

    def errors(self, job: Job | JobId | str, *, follow: bool = False) -> Iterator[Result]:
        """The requests that were rejected or failed, as `results` does for the others."""
        return self._rows(job_id(job), (ResultStatus.REJECTED, ResultStatus.FAILED), follow)

    def cancel(self, job: Job | JobId | str) -> JobState:
        """Ends the job: what has no result gets a `batch_cancelled` row. Raises UnknownJob."""
        return self._store.jobs.cancel(job_id(job))

    def workers(self) -> list[WorkerView]:
        """The workers that are alive."""
        return self._store.workers.list()

    def close(self) -> None:
        """Closes the database's connections."""
        self._store.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rows(
        self, job: JobId, statuses: tuple[ResultStatus, ...], follow: bool
    ) -> Iterator[Result]:
        if follow:
            return (result for result in self._followed(job) if result.status in statuses)
        parts = [self._store.results.iterate(job, status) for status in statuses]
        return map(Result, heapq.merge(*parts, key=lambda row: row.index))

    def _followed(self, job: JobId) -> Iterator[Result]:
        """Every row in order; waits at the first request that has none yet."""
        after, poll_s = -1, _SHORTEST_POLL_S
        while True:
            ended = self.status(job).state in TERMINAL_JOB_STATES  # before the look at the rows
            start = after
            for result in map(Result, self._store.results.iterate(job, after=after)):
                if result.index != after + 1 and not ended:
                    break
                after = result.index
                yield result
            if ended:
                return
            poll_s = _SHORTEST_POLL_S if after > start else min(poll_s * 1.5, _LONGEST_POLL_S)
            time.sleep(poll_s)


def job_id(job: Job | JobId | str) -> JobId:
    """The id of a handle or of itself."""
    return job.id if isinstance(job, Job) else JobId(job)


def _name_of(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return Path(source).name
    return Path(str(getattr(source, "name", ""))).name
