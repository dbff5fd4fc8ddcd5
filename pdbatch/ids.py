"""Names for look-alike strings and numbers, and the two ways to make one."""

from __future__ import annotations

import secrets
from typing import NewType

JobId = NewType("JobId", str)  # "job_" and 24 hex digits; sorts nowhere, means nothing
ShardIndex = NewType("ShardIndex", int)  # 0-based within its job
RequestIndex = NewType("RequestIndex", int)  # 0-based position of the line in the job's input
WorkerId = NewType("WorkerId", str)  # "<name>@<host>#<epoch>": one life of one worker
RequestKey = NewType("RequestKey", str)  # "<job>:<index>": a request's name outside SQL


def new_job_id() -> JobId:
    """A fresh job id: 96 random bits."""
    return JobId("job_" + secrets.token_hex(12))


def request_key(job: JobId, index: RequestIndex | int) -> RequestKey:
    """The one name of a request in the engine, in Redis and in logs."""
    return RequestKey(f"{job}:{index}")


def split_key(key: RequestKey | str) -> tuple[JobId, RequestIndex]:
    """The inverse of `request_key`. Raises ValueError for anything else."""
    job, _, index = key.rpartition(":")
    return JobId(job), RequestIndex(int(index))
