"""A Celery pool whose places are shards in an engine.

1. `on_start` starts the engine and waits for it; Celery consumes nothing before.
2. `on_apply`, in the consumer's thread, never waits: a shard goes to the worker's core, a
   `generate` to the tracker of answers, any other task to a thread.
3. When the work is done, Celery's own trace runs the task's body, which fetches the outcome
   (`tasks.handover`), in the thread of outcomes; the result goes back to the consumer's
   thread through a pipe that its event loop watches, because only that thread may acknowledge.
4. `revoke(terminate=True)` cancels the requests; so does `revoke` of what has not started.
5. SIGTERM: `on_stop` drains; what is not done in time goes back to the queue.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from celery import signals
from celery.concurrency.base import BasePool
from celery.worker import state

from pdbatch.queues import GENERATE_TASK, PREFILL_TASK
from tasks import handover
from tasks.answers import Answers
from tasks.app import settings
from tasks.worker.core import WorkerCore
from tasks.worker.engine_config import shards_at_once

logger = logging.getLogger(__name__)

DRAIN_S = 12.0
"""Less than what supervisors grant (20 s and more), so that the worker signs off by itself."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Place:
    """One task in the pool; what `on_apply` returns, so that a revoke finds it."""

    pool: EnginePool
    pid: int
    """Stands for a process id in Celery's eyes; unique in this worker's life."""
    name: str
    task_id: str
    kwargs: dict[str, Any]
    run: Callable[[], Any]
    """Celery's trace of the task."""
    callback: Callable[[Any], None]
    began: float
    """On the monotonic clock, s."""
    ended: bool = False

    def terminate(self, signal: int | None = None) -> None:
        """Celery's `revoke(terminate=True)`."""
        self.pool.terminate_job(self.pid, signal)


class EnginePool(BasePool):  # type: ignore[misc]
    """See the module. `-P custom` with `CELERY_CUSTOM_WORKER_POOL=tasks.pool:EnginePool`."""

    task_join_will_block = False
    signal_safe = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places: dict[int, Place] = {}
        self._pids = itertools.count(1)
        self._done: deque[tuple[Place, Any]] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.core: WorkerCore | None = None

    # --- life

    def on_start(self) -> None:
        """Start the engine; raises what keeps it from starting, which ends the worker."""
        self._settings = settings()
        self.core = WorkerCore(self._settings)
        self.core.start(state.maybe_shutdown)
        self._outcomes = ThreadPoolExecutor(1, thread_name_prefix="pdbatch-outcomes")
        self._others = ThreadPoolExecutor(2, thread_name_prefix="pdbatch-tasks")
        self._answers = Answers(self.core.store, self._settings, self.core.die)
        signals.task_revoked.connect(self._on_revoked)

    def register_with_event_loop(self, loop: Any) -> None:
        """Let the consumer's loop watch the pipe of outcomes."""
        loop.add_reader(self._wake_read, self._deliver)

    def on_stop(self) -> None:
        """Drain."""
        if self.core is None:
            return
        self._answers.stop()
        self.core.drain(DRAIN_S)
        self._outcomes.shutdown(wait=True)
        self._others.shutdown(wait=True, cancel_futures=True)
        self._deliver()
        self._let_go()
        self.core = None

    def _let_go(self) -> None:
        """Messages of what was not done in time, or not begun, are for other workers, at once.
        (That of a shard that was given back is of an old attempt by now, and refused there.)"""
        for place in list(self._places.values()):
            request = state.requests.get(place.task_id)
            if request is None or place.ended:
                continue
            place.ended = True
            request.reject(requeue=True)

    def on_terminate(self) -> None:
        """Cold shutdown: the same without waiting."""
        if self.core is not None:
            self.core.drain(0.0)
            self.core = None

    # --- work

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any,
        kwargs: Any,
        accept_callback: Callable[[int, float], None] | None = None,
        callback: Callable[[Any], None] | None = None,
        **_: Any,
    ) -> Place:
        """Take a task in; see the module."""
        name, task_id, request = args[0], args[1], args[2]
        given = request.get("kwargs") or {}
        place = Place(
            pool=self,
            pid=next(self._pids),
            name=name,
            task_id=task_id,
            kwargs=given,
            run=lambda: target(*args, **kwargs),
            callback=callback or (lambda _: None),
            began=time.monotonic(),
        )
        self._places[place.pid] = place
        if accept_callback:
            accept_callback(place.pid, place.began)
        if name == PREFILL_TASK:
            self._start_shard(place)
        elif name == GENERATE_TASK:
            self._answers.start(
                task_id, request.get("args") or (), given, lambda out: self._finish(place, out)
            )
        else:
            self._others.submit(self._trace, place)
        return place

    def _start_shard(self, place: Place) -> None:
        assert self.core is not None
        try:
            job, shard = str(place.kwargs["job"]), int(place.kwargs["shard"])
            attempt = int(place.kwargs["attempt"])
        except (KeyError, TypeError, ValueError) as error:
            problem = ValueError(f"a shard's message needs job, shard and attempt: {error!r}")
            self._finish(place, handover.raising(problem))
            return
        self.core.submit_shard(job, shard, attempt, lambda: self._finish(place, lambda: None))

    def _finish(self, place: Place, outcome: Callable[[], Any]) -> None:
        """The work of a place is done; from any thread."""
        if place.ended:
            return
        handover.leave(place.task_id, outcome)
        with suppress(RuntimeError):  # the pool is shut down: the message comes again
            self._outcomes.submit(self._trace, place)

    def _trace(self, place: Place) -> None:
        """Celery's own run of the body: result, signals, chords."""
        failed, value, _ = place.run()
        runtime_s = time.monotonic() - place.began  # of the work, not of the body
        self._done.append((place, (failed, value, runtime_s)))
        with suppress(BlockingIOError, OSError):  # a full pipe wakes the loop too
            os.write(self._wake_write, b"x")

    def _deliver(self, *_: Any) -> None:
        """In the consumer's thread: acknowledge, send events."""
        with suppress(BlockingIOError, OSError):
            os.read(self._wake_read, 65536)
        while self._done:
            place, result = self._done.popleft()
            self._places.pop(place.pid, None)
            if not place.ended:
                place.ended = True
                place.callback(result)

    # --- revoked

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Celery acknowledges a terminated task itself; its requests are cancelled by the signal
        `task_revoked`, which follows."""
        place = self._places.pop(pid, None)
        if place is not None:
            place.ended = True

    def _on_revoked(self, request: Any = None, **_: Any) -> None:
        """Revoked, started or not: rows `batch_cancelled` for what has none."""
        name = getattr(request, "name", None) or getattr(request, "task", None)
        kwargs = getattr(request, "kwargs", None) or {}
        if name == PREFILL_TASK and self.core is not None:
            self._others.submit(self._cancel, str(kwargs.get("job")), int(kwargs.get("shard", -1)))
        elif name == GENERATE_TASK:
            self._others.submit(self._answers.cancel, request.id)

    def _cancel(self, job: str, shard: int) -> None:
        try:
            if self.core is not None:
                self.core.cancel_shard(job, shard)
        except Exception:
            logger.exception("shard %d of %s could not be cancelled", shard, job)

    # --- seen from outside

    @property
    def num_shards(self) -> int:
        """Shards that it works on at once; known when the engine is ready."""
        assert self.core is not None, "asked after the start"
        return shards_at_once(self._settings, self.core.info.device)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        info["places-in-use"] = len(self._places)
        if self.core is not None:
            engine = self.core.info
            info |= {
                "worker": str(self.core.life.id),
                "role": engine.role,
                "model": engine.model,
                "device": engine.device,
                "dtype": engine.dtype,
                "engine-pid": engine.pid,
                "transports": ", ".join(engine.transports),
            }
            figures = self.core.figures()
            info["kv-blocks-free"] = figures.pop("free_blocks", engine.num_blocks)
            info["kv-blocks-total"] = figures.pop("total_blocks", engine.num_blocks)
            info["sequences-running"] = figures.pop("running", 0)
            info["sequences-waiting"] = figures.pop("waiting", 0)
            info |= {key.replace("_", "-"): value for key, value in figures.items()}
        return info
