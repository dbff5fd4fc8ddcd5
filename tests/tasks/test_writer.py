"""When rows are written: in groups, and at once when nothing else is on its way."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

from pdbatch.ids import WorkerId
from pdbatch.request import RequestError, RequestOutput
from tasks.worker.writer import ResultWriter

DEADLINE_S = 30.0


def row(number: int) -> RequestOutput:
    error = RequestError(code="batch_failed", message="no")
    return RequestOutput(key=f"job_1:{number}", error=error)


def writer(written: queue.Queue[list[str]], **options: Any) -> ResultWriter:
    def fail(error: BaseException) -> None:
        written.put([repr(error)])

    store: Any = SimpleNamespace(results=SimpleNamespace(write=lambda worker, rows: None))
    return ResultWriter(store, lambda: WorkerId("w#1"), written.put, fail, **options)


def test_a_group_is_written_when_it_is_full_and_not_before() -> None:
    written: queue.Queue[list[str]] = queue.Queue()
    made = writer(written, group_size=3, group_ms=3_600_000)
    try:
        made.put([row(1), row(2)])
        made.put([row(3), row(4)])
        assert written.get(timeout=DEADLINE_S) == ["job_1:1", "job_1:2", "job_1:3"]
        assert made.num_waiting == 1 and written.empty()
    finally:
        made.stop()


def test_a_group_that_nothing_can_join_is_written_at_once() -> None:
    written: queue.Queue[list[str]] = queue.Queue()
    asked: list[bool] = []

    def more_will_come() -> bool:
        asked.append(len(asked) < 2)
        return asked[-1]

    made = writer(written, group_size=512, group_ms=3_600_000, more_will_come=more_will_come)
    try:
        made.put([row(1), row(2)])
        assert written.get(timeout=DEADLINE_S) == ["job_1:1", "job_1:2"]
        assert asked == [True, True, False], "asked again as long as more was to come"
    finally:
        made.stop()
