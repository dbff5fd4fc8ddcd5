"""The way in: lines of a source, parsed and written to the store as they come.

Memory stays constant however long the source is. A line that is wrong becomes an error row;
a source that cannot be read at all raises InputError, and its job, if it exists, is FAILED.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from pdbatch.formats import Parsed, Reject, encode_spec, read_requests
from pdbatch.ids import JobId
from pdbatch.queues import canonical_model
from pdbatch.store import IngestRow, NewJob, Store

if TYPE_CHECKING:
    from pdbatch.config import Settings

_REPORT_EVERY_S = 0.2
_LOOK_EVERY_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestProgress:
    """How far the way in has come."""

    job: JobId
    num_rows: int = 0
    """Lines taken in, the rejected ones included."""
    num_rejected: int = 0
    models: frozenset[str] = field(default_factory=frozenset)
    """The models that the requests so far want, in their canonical form."""
    done: bool = False
    """All is taken in."""


def take_in(
    store: Store,
    settings: Settings,
    source: Any,
    wanted: NewJob,
    on_progress: Callable[[IngestProgress], None] | None = None,
) -> tuple[JobId, IngestProgress]:
    """Makes the job, reads `source` into it and lets it run. Raises InputError, StoreError."""
    lines = _opened(read_requests(_plain(source), max_line_bytes=settings.max_line_bytes))
    job_model = canonical_model(wanted.model) if wanted.model else None
    job = store.jobs.create(replace(wanted, model=job_model))
    rows = _Rows(job, job_model, canonical_model(settings.model))
    next_report = time.monotonic() + _REPORT_EVERY_S
    with store.ingest(
        job, shard_size=settings.shard_size, default_model=rows.default_model
    ) as ingest:
        for number, parsed in enumerate(lines, start=1):
            ingest.add(rows.row(parsed))
            if on_progress and not number % _LOOK_EVERY_ROWS and time.monotonic() >= next_report:
                next_report = time.monotonic() + _REPORT_EVERY_S
                on_progress(rows.progress())
    if on_progress:
        on_progress(rows.progress(done=True))
    return job, rows.progress(done=True)


class _Rows:
    """Turns what the reader yields into rows for the store, and counts."""

    def __init__(self, job: JobId, job_model: str | None, default_model: str) -> None:
        self._job = job
        self._job_model = job_model
        self.default_model = default_model
        self._models: set[str] = set()
        self._num_rows = self._num_rejected = 0

    def row(self, parsed: Parsed) -> IngestRow:
        """The row of one line."""
        self._num_rows += 1
        index, line, custom_id = parsed.index, parsed.line, parsed.custom_id
        if isinstance(parsed, Reject):
            self._num_rejected += 1
            return IngestRow(index, custom_id, None, None, parsed.error, line)
        model, spec = self._job_model, parsed.spec
        if model is None and parsed.model:
            model = canonical_model(parsed.model)
        self._models.add(model or self.default_model)
        return IngestRow(index, custom_id, model, encode_spec(spec), None, line, spec.endpoint)

    def progress(self, *, done: bool = False) -> IngestProgress:
        """How far it has come."""
        return IngestProgress(
            job=self._job,
            num_rows=self._num_rows,
            num_rejected=self._num_rejected,
            models=frozenset(self._models),
            done=done,
        )


def _plain(source: Any) -> Any:
    return os.fspath(source) if isinstance(source, os.PathLike) else source


def _opened(rows: Iterator[Parsed]) -> Iterator[Parsed]:
    """The same rows, the first of them read already: a source that cannot be opened leaves no
    job behind."""
    for first in rows:
        return chain([first], rows)
    return iter(())
