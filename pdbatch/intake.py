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


def take_in(
    store: Store,
    settings: Settings,
    source: Any,
    wanted: NewJob,
    on_progress: Callable[[IngestProgress], None] | None = None,
) -> tuple[JobId, IngestProgress]:
    """Makes the job, reads `source` into it and lets it run. Raises InputError, StoreError."""
    rows = _opened(read_requests(_plain(source), max_line_bytes=settings.max_line_bytes))
    job_model = canonical_model(wanted.model) if wanted.model else None
    job = store.jobs.create(replace(wanted, model=job_model))
    default_model = canonical_model(settings.model)
    models: set[str] = set()
    num_rows = num_rejected = 0
    last_report = time.monotonic()

    def progress() -> IngestProgress:
        return IngestProgress(
            job=job, num_rows=num_rows, num_rejected=num_rejected, models=frozenset(models)
        )

    with store.ingest(job, shard_size=settings.shard_size, default_model=default_model) as ingest:
        for parsed in rows:
            num_rows += 1
            if isinstance(parsed, Reject):
                num_rejected += 1
                ingest.add(_rejected(parsed))
            else:
                model = job_model or (canonical_model(parsed.model) if parsed.model else None)
                models.add(model or default_model)
                spec = parsed.spec
                ingest.add(
                    IngestRow(
                        parsed.index,
                        parsed.custom_id,
                        model,
                        encode_spec(spec),
                        None,
                        parsed.line,
                        spec.endpoint,
                    )
                )
            if on_progress and not num_rows % _LOOK_EVERY_ROWS:
                now = time.monotonic()
                if now - last_report >= _REPORT_EVERY_S:
                    last_report = now
                    on_progress(progress())
    if on_progress:
        on_progress(progress())
    return job, progress()


def _rejected(parsed: Reject) -> IngestRow:
    return IngestRow(parsed.index, parsed.custom_id, None, None, parsed.error, parsed.line)


def _plain(source: Any) -> Any:
    return os.fspath(source) if isinstance(source, os.PathLike) else source


def _opened(rows: Iterator[Parsed]) -> Iterator[Parsed]:
    """The same rows, the first of them read already: a source that cannot be opened leaves no
    job behind."""
    for first in rows:
        return chain([first], rows)
    return iter(())
