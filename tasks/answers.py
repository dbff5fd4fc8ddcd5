"""The open `generate` tasks of a worker, and their answers.

A `generate` is put into the store as a job of one request, like every other, and runs wherever
there is room. This looks for the rows of all open ones, together, some times a second.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pdbatch.config import Settings
from pdbatch.errors import UnknownJob
from pdbatch.ids import JobId
from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import Store
from tasks import handover
from tasks.generate import GenerateFailed, job_of, outcome, start
from tasks.worker.loop import Loop

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
_REMEMBERED = 1000

Outcome = Callable[[], Any]


class Answers:
    """`start` from the consumer's thread; `done` is called once, from another."""

    def __init__(
        self, store: Store, settings: Settings, on_bug: Callable[[BaseException], None]
    ) -> None:
        self._store, self._settings = store, settings
        self._new: queue.SimpleQueue[
            tuple[str, Sequence[Any], Mapping[str, Any], Callable[[Outcome], None]]
        ] = queue.SimpleQueue()
        self._revoked: deque[str] = deque(maxlen=_REMEMBERED)
        self._open: dict[JobId, list[Callable[[Outcome], None]]] = {}
        """Who waits for each job's row: more than one where a message came twice."""
        self._loop = Loop("answers", self._step, on_bug)
        self._loop.start()

    def start(
        self,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        done: Callable[[Outcome], None],
    ) -> None:
        """A task has come; `done` gets what returns its result or raises its error."""
        self._new.put((task_id, args, kwargs, done))
        self._loop.wake()

    def cancel(self, task_id: str) -> None:
        """The task was revoked: its job is cancelled, nobody waits for it any more."""
        job = job_of(task_id)
        self._revoked.append(task_id)
        self._open.pop(job, None)
        try:
            self._store.jobs.cancel(job)
        except UnknownJob:
            pass  # it was not taken in yet, and will not be
        except Exception as error:
            logger.warning("%s was revoked, its job not cancelled: %s", task_id, error)

    def stop(self) -> None:
        """Look no more; messages of open tasks come again and find their jobs again."""
        self._loop.stop()

    def _step(self) -> float:
        while not self._new.empty():
            task_id, args, kwargs, done = self._new.get()
            if task_id not in self._revoked:
                self._take_in(task_id, args, kwargs, done)
        if not self._open:
            return 1.0
        states = self._store.jobs.states(list(self._open))
        for job in [job for job, state in states.items() if state in TERMINAL_JOB_STATES]:
            row = self._store.results.get(job, 0)
            for done in self._open.pop(job, ()):
                done(partial(outcome, row))
        return LOOK_EVERY_S

    def _take_in(
        self,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        done: Callable[[Outcome], None],
    ) -> None:
        try:
            job = start(self._store, self._settings, task_id, args, kwargs)
        except GenerateFailed as error:
            done(handover.raising(error))
        except BaseException:
            self._new.put((task_id, args, kwargs, done))  # the database is away: again later
            raise
        else:
            self._open.setdefault(job, []).append(done)
