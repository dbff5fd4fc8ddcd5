"""Speeds over the last seconds, and when a job will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdbatch.store import JobView

_WINDOW_S = 15.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a job, now."""

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    """Output tokens of the requests that ended."""
    eta_s: float | None = None
    """Seconds until the last request is done; None while nothing moves."""


class SpeedMeter:
    """Fed with views of one job; `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, int, int]] = deque()

    def feed(self, view: JobView) -> Speed:
        """The speed with this view as the latest."""
        now = self._clock()
        self._points.append((now, view.counts.done, view.tokens.output))
        while len(self._points) > 2 and now - self._points[1][0] >= _WINDOW_S:
            self._points.popleft()
        then, done, tokens = self._points[0]
        if now <= then:
            return Speed()
        requests_per_s = (view.counts.done - done) / (now - then)
        tokens_per_s = (view.tokens.output - tokens) / (now - then)
        left = view.counts.total - view.counts.done
        return Speed(
            requests_per_s, tokens_per_s, left / requests_per_s if requests_per_s > 0 else None
        )
