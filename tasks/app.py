"""The Celery application: one configuration for workers, clients, the feeder and Flower.

The settings are read when Celery first asks for its configuration, not at import; nothing is
contacted before something is sent. What the options are for:

- The database is the truth; messages are hints. A message is acknowledged late, restored by
  nobody in a hurry, and harmless when it comes twice.
- A queue is one plain Redis list: no emulated priorities, so that its length is `LLEN` and its
  oldest message `LINDEX -1`. Workers ask the queues in the order of their priority.
- JSON only, both ways.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from celery import Celery
from celery.app.task import Task
from celery.worker.request import Request

from pdbatch.config import Settings
from pdbatch.local.processes import LEAST_SHARDS, POOL, with_broker, worker_name, worker_queues
from pdbatch.queues import GENERATE_QUEUE, GENERATE_TASK
from tasks.leases import VISIBILITY_S, owed
from tasks.redis_channels import adapt_redis_channels

logger = logging.getLogger(__name__)

_STEPS = {"tasks.events:Events", "tasks.lanes:Lanes", "tasks.leases:Leases"}


@cache
def settings() -> Settings:
    """This process's settings, read once, the broker's address filled in. Raises ConfigError."""
    return with_broker(Settings.load())


def build_app(given: Settings | None = None) -> Celery:
    """A Celery application for these settings; None: for `settings()`, when first needed."""
    celery_app = Celery(
        "pdbatch",
        include=["tasks.shards", "tasks.generate"],
        task_cls=SteadyTask,
        set_as_current=given is None,
    )
    celery_app.add_defaults(lambda: configuration(with_broker(given) if given else settings()))
    celery_app.steps["consumer"] |= _STEPS
    return celery_app


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's configuration for settings that name a broker."""
    adapt_redis_channels()
    broker = celery_url(settings.broker_url or "")
    backend = celery_url(settings.result_backend) if settings.result_backend else broker
    queues = worker_queues(settings.role, settings.model, worker_name(settings))
    return {
        "broker_url": broker,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "visibility_timeout": VISIBILITY_S,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 30,
            "queue_order_strategy": "priority",
            "priority_steps": [0],
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        "result_backend": backend,
        "result_extended": True,
        "redis_socket_keepalive": "+socket://" not in backend,  # no option of a Unix socket
        "redis_backend_health_check_interval": 10,
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "task_acks_late": True,
        "task_track_started": True,
        "task_default_queue": GENERATE_QUEUE,  # bodies of chords, and whatever else is ordinary
        "task_routes": {GENERATE_TASK: {"queue": GENERATE_QUEUE}},
        "task_queues": {name: {"exchange": name, "routing_key": name} for name in queues},
        "worker_pool": POOL,
        "worker_concurrency": settings.worker_shards or LEAST_SHARDS,
        "worker_prefetch_multiplier": 1,
        "worker_enable_prefetch_count_reduction": False,  # counts acks that go through Celery
        "worker_send_task_events": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def celery_url(url: str) -> str:
    """The address of a Redis as Celery spells it: `redis+socket` for `unix`, no `valkey`."""
    if url.startswith("unix://"):
        path = url.removeprefix("unix://").replace("?db=", "?virtual_host=")
        return f"redis+socket://{path.replace('&db=', '&virtual_host=')}"
    return url.replace("valkey", "redis", 1) if url.startswith("valkey") else url


class SteadyRequest(Request):  # type: ignore[misc]
    """A message whose acknowledgement may fail: Redis went away meanwhile, whatever the error.

    The consumer finds that out by itself and connects again; the message comes twice. It is done at
    once, not in the loop's next turn as Celery does it: there an error that is none of the
    connection's ends the worker, and after the loop's end, in a drain, there is no next turn.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        if hasattr(message, "ack"):
            self._on_ack = lambda *_: message.ack()
            self._on_reject = lambda logger, errors, requeue: message.reject(requeue=requeue)

    def acknowledge(self) -> None:
        """Ack, or say why not."""
        self._attempt("acknowledged", super().acknowledge)

    def reject(self, requeue: bool = False) -> None:
        """Reject, or say why not."""
        self._attempt("rejected", partial(super().reject, requeue=requeue))

    def _attempt(self, verb: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("message %s was not %s, it may come again: %s", self.id, verb, reason)
            tag = getattr(self.message, "delivery_tag", None)
            if verb == "acknowledged" and tag is not None:
                owed.append(tag)


class SteadyTask(Task):  # type: ignore[misc]
    """Base of our tasks."""

    Request = "tasks.app:SteadyRequest"


app = build_app()
"""What `celery -A tasks` finds."""
