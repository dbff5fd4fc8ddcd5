"""Rows, written in groups: up to so many, or what came within so many milliseconds; sooner when
nothing else is on its way, so that a job's end does not wait for rows that nobody computes.

A database that is away is waited for; rows wait meanwhile, and `is_full` tells the claimers to
stop. Rows of a job that was deleted are dropped. A row that cannot be encoded becomes an error row.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence

from pdbatch.errors import UnknownJob
from pdbatch.ids import WorkerId
from pdbatch.request import RequestError, RequestOutput
from pdbatch.store import ResultRow, Store
from tasks.worker.loop import Loop

logger = logging.getLogger(__name__)

QUIET_S = 0.02
"""No row for so long, and none on its way: the group is written."""
FULL_ROWS = 8192
"""So many rows waiting for the database mean: no new work."""


class ResultWriter:
    """`put` from any thread; `on_written` is called with the keys after their commit."""

    def __init__(
        self,
        store: Store,
        worker: Callable[[], WorkerId | None],
        on_written: Callable[[list[str]], None],
        on_bug: Callable[[BaseException], None],
        *,
        group_size: int,
        group_ms: int,
        more_will_come: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store, self._worker, self._on_written = store, worker, on_written
        self._group_size, self._group_s = group_size, group_ms / 1000
        self._more_will_come = more_will_come
        self._queue: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._group: list[tuple[str, ResultRow]] = []
        self._loop = Loop("writer", self._step, on_bug)
        self._loop.start()

    def put(self, outputs: Sequence[RequestOutput]) -> None:
        """Rows to be written."""
        for output in outputs:
            self._queue.put(output)

    @property
    def num_waiting(self) -> int:
        """Rows that are not committed yet."""
        return self._queue.qsize() + len(self._group)

    @property
    def is_full(self) -> bool:
        """True while the database cannot keep up."""
        return self.num_waiting > FULL_ROWS

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is committed; False if it was not in time."""
        deadline = time.monotonic() + timeout_s
        while self.num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.num_waiting

    def stop(self) -> None:
        """No further group."""
        self._loop.stop()

    def _step(self) -> float:
        if not self._group:  # else: the last write failed, the group is still here
            self._gather()
        if self._group:
            self._write([row for _, row in self._group])
            keys = [key for key, _ in self._group]
            self._group = []
            self._on_written(keys)
        return 0.0

    def _gather(self) -> None:
        try:
            self._group.append(_row(self._queue.get(timeout=0.5)))
        except queue.Empty:
            return
        deadline = time.monotonic() + self._group_s
        while len(self._group) < self._group_size:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                output = self._queue.get(timeout=min(left_s, QUIET_S))
            except queue.Empty:
                if left_s > QUIET_S and self._more_will_come():
                    continue
                return
            self._group.append(_row(output))

    def _write(self, rows: list[ResultRow]) -> None:
        try:
            self._store.results.write(self._worker(), rows)
        except UnknownJob as error:
            logger.error("rows are dropped: %s", error)
            by_job: dict[str, list[ResultRow]] = {}
            for row in rows:
                by_job.setdefault(row.job, []).append(row)
            if len(by_job) > 1:
                for group in by_job.values():
                    self._write(group)


def _row(output: RequestOutput) -> tuple[str, ResultRow]:
    try:
        return output.key, ResultRow.from_output(output)
    except Exception as error:  # whatever a model put out must not stop the others' rows
        logger.exception("the output of %s cannot be written", output.key)
        failed = RequestOutput(
            key=output.key,
            error=RequestError(
                code="batch_failed", message=f"The output cannot be encoded: {error}."
            ),
        )
        return output.key, ResultRow.from_output(failed)
