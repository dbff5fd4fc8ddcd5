"""Looking at an engine from outside: each stage's beginning and end, told to whoever asks.

`watch` replaces methods of one engine by wrappers that tell; an engine that nobody watches runs its
own methods and pays nothing. The stages of a round, all within `step`:

    pulls      ended pulls taken in, new ones begun       (decode engines)
    schedule   the next batch chosen
    input      packed for the runner
    launch     the model's work queued on the device      (on a CPU: done)
    sample     its tokens chosen                          (on a device: queued)
    wait       for the tokens of the oldest step in flight
    advance    tokens appended, ends, results
    hand-off   blocks pinned and described                (prefill engines; within `advance`)

`pull` is the reading of one prompt's KV, in a thread of its own beside the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Protocol

_STAGES = (
    ("scheduler", "schedule", "schedule"),
    ("_stepper", "retire", "wait"),
    ("_stepper._packer", "pack", "input"),
    ("_stepper._model.runner", "execute", "launch"),
    ("_stepper._model.sampler", "choose", "sample"),
    ("_life", "advance", "advance"),
    ("_adoptions", "collect", "pulls"),
    ("_adoptions", "start", "pulls"),
    ("_transfers", "pin", "hand-off"),
)
"""(part of the engine, method, stage)"""


class Watcher(Protocol):
    """Who is told."""

    def stage(self, name: str, start_s: float, end_s: float, own_s: float, /) -> None:
        """A stage ended. Seconds on `time.perf_counter`; `own_s` is without stages within it."""
        ...

    def batch(self, plan: Any, engine: Any, /) -> None:
        """The scheduler's choice, just made."""
        ...

    def pull(self, start_s: float, end_s: float, result: Any, /) -> None:
        """A pull ended; called in its thread."""
        ...


def watch(engine: Any, watcher: Watcher, settle: Callable[[], None] | None = None) -> None:
    """Tell `watcher` of every stage of `engine` (an `Engine`) from now on.

    `settle` is called at the end of a stage, before its time is taken: one that waits for the
    device tells what the work costs instead of what launching it costs.
    """
    clock = Clock(watcher, settle)
    for part, method, stage in _STAGES:
        owner = attrgetter(part)(engine)
        if owner is not None:  # parts that this role does without
            setattr(owner, method, clock.timed(getattr(owner, method), stage))
    engine.step = clock.timed(engine.step, "step")
    schedule = engine.scheduler.schedule

    def scheduled(*args: Any, **options: Any) -> Any:
        plan = schedule(*args, **options)
        watcher.batch(plan, engine)
        return plan

    engine.scheduler.schedule = scheduled
    if engine._transfers is not None:
        engine._transfers._pull = _pulling(engine._transfers._pull, watcher)


class Clock:
    """Times stages of one thread that may lie within each other."""

    def __init__(self, watcher: Watcher, settle: Callable[[], None] | None) -> None:
        self._watcher = watcher
        self._settle = settle
        self._inner_s: list[float] = []
        """Of each stage that is under way: the time of the stages within it."""

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """`function`, told as `stage`; also when it raises."""

        def timed(*args: Any, **options: Any) -> Any:
            self._inner_s.append(0.0)
            start_s = time.perf_counter()
            try:
                result = function(*args, **options)
                if self._settle is not None:
                    self._settle()
                return result
            finally:
                end_s = time.perf_counter()
                inner_s = self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += end_s - start_s
                self._watcher.stage(stage, start_s, end_s, end_s - start_s - inner_s)

        return timed


def _pulling(pull: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        start_s = time.perf_counter()
        result = pull(*args, **options)
        watcher.pull(start_s, time.perf_counter(), result)
        return result

    return timed
