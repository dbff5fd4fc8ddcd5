"""Jobs as people see them: counts, tokens and times rolled up from the rows of the shards."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, select

from pdbatch.ids import JobId
from pdbatch.request import StageTimes
from pdbatch.states import JobState
from pdbatch.store.keys import job_range
from pdbatch.store.models import JOBS, SHARDS
from pdbatch.store.rows import Counts, JobView, TokenCounts

_STAGES = StageTimes.__struct_fields__
_SUMMED = (
    "num_requests",
    "num_succeeded",
    "num_rejected",
    "num_failed",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "transfer_bytes",
    *_STAGES,
)
_ROLL_UP = select(*(func.coalesce(func.sum(SHARDS.c[name]), 0).label(name) for name in _SUMMED))


def view_jobs(conn: Connection, where: ColumnElement[bool] | None, limit: int) -> list[JobView]:
    """Jobs `where`, the newest first."""
    query = select(JOBS).order_by(JOBS.c.no.desc()).limit(limit)
    if where is not None:
        query = query.where(where)
    return [_view(job, _sums(conn, job.no)) for job in conn.execute(query).all()]


def _sums(conn: Connection, job_no: int) -> Row[Any]:
    first, last = job_range(job_no)
    return conn.execute(_ROLL_UP.where(SHARDS.c.id.between(first, last))).one()


def _view(job: Row[Any], sums: Row[Any]) -> JobView:
    return JobView(
        id=JobId(job.id),
        state=JobState(job.state),
        model=job.model,
        endpoint=job.endpoint,
        priority=job.priority,
        weight=job.weight,
        input_name=job.input_name,
        metadata=job.metadata,
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        deadline_at=job.deadline_at,
        counts=Counts(
            total=int(sums.num_requests),
            succeeded=int(sums.num_succeeded),
            rejected=int(sums.num_rejected),
            failed=int(sums.num_failed),
        ),
        tokens=TokenCounts(
            prompt=int(sums.prompt_tokens),
            cached=int(sums.cached_tokens),
            output=int(sums.output_tokens),
        ),
        times=StageTimes(**{stage: float(getattr(sums, stage)) for stage in _STAGES}),
        transfer_bytes=int(sums.transfer_bytes),
    )
