"""A thread that does one step again and again, and outlives outages.

A step returns the seconds to wait before the next one (0: at once). A database or a Redis that is
away is logged once and tried again, ever slower, until it is back; any other exception is a bug of
ours and goes to `on_bug`, which ends the worker: a worker without one of its loops does harm.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pdbatch.errors import EngineDied, QueueError, StoreError

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0


class Loop:
    """One thread, a daemon; `wake` cuts its waiting short, `stop` ends it after its step."""

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        on_bug: Callable[[BaseException], None],
        outages: tuple[type[Exception], ...] = (),
    ) -> None:
        self._name, self._step, self._on_bug = name, step, on_bug
        self._outages: tuple[type[Exception], ...] = (StoreError, QueueError, *outages)
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name=f"pdbatch-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Take the next step now."""
        self._wake.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Take no further step; wait for the one under way."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        away_s = 0.0
        while not self._stop:
            try:
                pause_s = self._step()
                if away_s:
                    logger.info("%s: back after an outage", self._name)
                    away_s = 0.0
            except self._outages as error:
                if not away_s:
                    logger.warning("%s: waits for its peer: %s", self._name, error)
                pause_s = away_s = min(LONGEST_WAIT_S, away_s * 2 or FIRST_WAIT_S)
            except EngineDied:
                return  # the reader of the engine's events deals with it
            except BaseException as error:
                self._on_bug(error)
                return
            if pause_s > 0:
                self._wake.wait(pause_s)
            self._wake.clear()
