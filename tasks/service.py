"""The process of feeder and reconciler: `python -m tasks reconciler`.

1. The store is opened (the embedded one made or upgraded); nothing else is needed to start.
2. Every `reconcile_every_s`: bury the dead, publish what was lost, fill the queues. For new jobs
   it looks every `LOOK_EVERY_S`; queues that were found empty are looked at within `HURRY_S`.
3. Where the database or Redis is away, that is said once, and tried again until it is back.
4. SIGTERM or SIGINT ends the round; what is under way is finished first.

Any number of these may run, and each may be killed at any moment.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

from celery import Celery
from kombu.exceptions import KombuError
from redis import RedisError

from pdbatch.config import Settings
from pdbatch.errors import PdbatchError
from pdbatch.local.database import prepare
from pdbatch.store import Store
from tasks.feeder import Feeder
from tasks.queue import Publisher, open_client
from tasks.reconciler import Reconciler

logger = logging.getLogger(__name__)

HURRY_S = 0.05
LOOK_EVERY_S = 0.1
STORE_RETRY_S = 5.0
AWAY = (PdbatchError, RedisError, KombuError, OSError)
"""What the absence of the database or of Redis looks like."""


def serve(settings: Settings, app: Celery) -> None:
    """Feed and reconcile until SIGTERM or SIGINT. Raises StoreError for a database that cannot
    be opened at the start."""
    stop = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        logger.info("%s: ending", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    prepare(settings)
    attempts = settings.max_attempts
    with Store.open(settings.database_url, max_attempts=attempts, retry_s=STORE_RETRY_S) as store:
        service = Service(settings, store, app)
        logger.info("feeding the queues from %s", store.url)
        try:
            service.run(stop)
        finally:
            service.close()


class Service:
    """The rounds; `run` is the loop around `step`."""

    def __init__(self, settings: Settings, store: Store, app: Celery) -> None:
        self._every_s = settings.reconcile_every_s
        self._client = open_client(settings.broker_url or "")
        self._publisher = Publisher(app)
        self.feeder = Feeder(store, self._client, self._publisher, settings)
        self.reconciler = Reconciler(store, self._client, settings)
        self._steps = {name: _Step(name) for name in ("reconciling", "feeding")}
        self._next_round_s = 0.0
        self._hungry = False

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set."""
        while not stop.is_set():
            stop.wait(self.step())

    def step(self) -> float:
        """One look, a round where one is due; returns the seconds until the next."""
        now_s = time.monotonic()
        if now_s >= self._next_round_s:
            self._next_round_s = now_s + self._every_s
            self._steps["reconciling"].attempt(self._reconcile)
            self._feed(self.feeder.survey)
        elif self._hungry:
            self._feed(self.feeder.refill)
        else:
            self._feed(partial(self.feeder.survey, may_shrink=False))
        left_s = max(0.0, self._next_round_s - time.monotonic())
        return min(left_s, HURRY_S if self._hungry else LOOK_EVERY_S)

    def _reconcile(self) -> None:
        self.reconciler.sweep()
        self.reconciler.requeue()

    def _feed(self, look: Callable[[], bool]) -> None:
        self._hungry = False

        def feed() -> None:
            self._hungry = look()

        if not self._steps["feeding"].attempt(feed):
            self._hungry = False

    def close(self) -> None:
        """Close the connections to Redis."""
        self._publisher.close()
        self._client.close()


class _Step:
    """A step that may fail; a failure is told when it begins, changes and ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = ""

    def attempt(self, work: Callable[[], None]) -> bool:
        """Whether it went well."""
        try:
            work()
        except Exception as error:
            kind = type(error).__name__
            if kind != self._told:
                self._told = kind
                known = isinstance(error, AWAY)
                logger.error(
                    "%s failed and is tried again: %s: %s",
                    self._name,
                    kind,
                    error,
                    exc_info=None if known else error,
                )
            return False
        if self._told:
            self._told = ""
            logger.info("%s goes on", self._name)
        return True
