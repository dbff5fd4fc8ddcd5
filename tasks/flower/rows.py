"""What the page of jobs shows, as plain rows, apart from how it is drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import JobView, Store, WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job as the page and `/api/jobs` show it."""

    id: str
    state: str
    input_name: str
    model: str
    total: int
    succeeded: int
    errors: int
    percent: float
    """Of the requests that have their row, 0 to 100."""
    requests_per_s: float | None
    """Over the whole run so far; None before it starts."""
    output_tokens_per_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    elapsed_s: float | None
    remaining_s: float | None
    """At the pace so far; None where nobody can know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One live worker."""

    name: str
    host: str
    role: str
    model: str
    device: str
    free_blocks: int | None
    total_blocks: int | None
    running: int | None
    waiting: int | None
    pinned: int | None
    seen_s: float
    """Since its last sign of life."""


def job_row(job: JobView, now: float) -> JobRow:
    """The row of one job at `now`, seconds since the epoch by the database's clock."""
    done, total = job.counts.done, job.counts.total
    elapsed = None if job.started_at is None else (job.finished_at or now) - job.started_at
    pace = done / elapsed if elapsed else None
    over = job.state in TERMINAL_JOB_STATES
    return JobRow(
        id=job.id,
        state=str(job.state),
        input_name=job.input_name,
        model=job.model or "by line",
        total=total,
        succeeded=job.counts.succeeded,
        errors=done - job.counts.succeeded,
        percent=round(100 * done / total, 1) if total else 100.0 * over,
        requests_per_s=pace,
        output_tokens_per_s=job.tokens.output / elapsed if elapsed else None,
        prompt_tokens=job.tokens.prompt,
        cached_tokens=job.tokens.cached,
        output_tokens=job.tokens.output,
        elapsed_s=elapsed,
        remaining_s=(total - done) / pace if pace and not over else None,
    )


def worker_row(worker: WorkerView, now: float) -> WorkerRow:
    """The row of one worker at `now`; figures that it has not told yet are None."""
    stats = worker.stats
    return WorkerRow(
        name=worker.name,
        host=worker.host,
        role=worker.role,
        model=worker.model,
        device=worker.device,
        free_blocks=stats.get("free_blocks"),
        total_blocks=stats.get("total_blocks"),
        running=stats.get("running"),
        waiting=stats.get("waiting"),
        pinned=stats.get("pinned_requests"),
        seen_s=max(0.0, now - worker.heartbeat_at),
    )


def read_page(store: Store, limit: int = 50) -> tuple[list[JobRow], list[WorkerRow]]:
    """The newest `limit` jobs and all live workers. Two queries; runs in a thread."""
    now = store.now()
    jobs = [job_row(job, now) for job in store.jobs.list(limit=limit)]
    return jobs, [worker_row(worker, now) for worker in store.workers.list()]


def as_json(jobs: list[JobRow], workers: list[WorkerRow]) -> dict[str, list[dict[str, object]]]:
    """The same, for `/api/jobs`."""
    return {"jobs": [asdict(job) for job in jobs], "workers": [asdict(w) for w in workers]}
