"""Names of requests and shards outside SQL, and their one number inside.

id = job number << 32 | index        of a request in its job's input, or of a shard in its job
"""

from __future__ import annotations

from pdbatch.ids import RequestIndex, ShardIndex

_INDEX_BITS = 32
_INDEX_MASK = 2**_INDEX_BITS - 1
MAX_INDEX = _INDEX_MASK


def row_id(job_no: int, index: int) -> int:
    """The key of a request, or of a shard."""
    return job_no << _INDEX_BITS | index


def job_no_of(row: int) -> int:
    """The job's number in a key."""
    return row >> _INDEX_BITS


def request_index_of(row: int) -> RequestIndex:
    """The request's index in its key."""
    return RequestIndex(row & _INDEX_MASK)


def shard_index_of(row: int) -> ShardIndex:
    """The shard's index in its key."""
    return ShardIndex(row & _INDEX_MASK)


def job_range(job_no: int) -> tuple[int, int]:
    """The first and the last key that a job can have."""
    return row_id(job_no, 0), row_id(job_no, _INDEX_MASK)
