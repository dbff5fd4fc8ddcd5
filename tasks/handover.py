"""Outcomes on their way from the pool to a task's body.

Our tasks are not run by their bodies: the engine runs their requests. When those are done the
pool leaves the outcome here and lets Celery run the body, which fetches it; so result, signals,
callbacks, groups and chords are Celery's own work. A message that comes twice has two places in
the pool and leaves two outcomes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_outcomes: dict[str, list[Callable[[], Any]]] = {}
_lock = threading.Lock()


class WrongPool(RuntimeError):
    """A worker with a pool of another kind took one of our tasks."""


def leave(task_id: str, outcome: Callable[[], Any]) -> None:
    """`outcome` returns what the task returns, or raises what it raises."""
    with _lock:
        _outcomes.setdefault(task_id, []).append(outcome)


def fetch(task_id: str) -> Any:
    """The body's part. Raises what the outcome raises; WrongPool where there is none."""
    with _lock:
        left = _outcomes.get(task_id)
        if not left:
            raise WrongPool(
                "this task runs in a worker of pdbatch only; start it with `pdbatch worker`"
            )
        outcome = left.pop(0)
        if not left:
            del _outcomes[task_id]
    return outcome()


def raising(error: Exception) -> Callable[[], Any]:
    """An outcome that is this error."""

    def outcome() -> Any:
        raise error

    return outcome
