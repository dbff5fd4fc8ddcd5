"""Names that clients, feeder and workers share, and the way to the broker.

A queue is for one model and one priority: `pdbatch.<slug>.<high|normal|low>`. A worker
listens to the three of its model, `high` first. No Redis and no Celery is imported
before `connect` or `check_redis` is called.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pdbatch.errors import QueueError

if TYPE_CHECKING:
    from redis import Redis

PREFILL_TASK: Final = "pdbatch.prefill"
"""A shard, for a prefill or a mixed worker: `{"job", "shard", "attempt"}`."""
GENERATE_TASK: Final = "pdbatch.generate"
"""One prompt, by Celery's own means."""
GENERATE_QUEUE: Final = "pdbatch.generate"
PRIORITY_NAMES: Final = ("high", "normal", "low")
OLDEST_REDIS: Final = (6, 2)

_PATH_LIKE = re.compile(r"^(/|\./|\.\./|~|\.$|\.\.$)|\.gguf$")


def priority_name(priority: int) -> str:
    """`high` below 0, `normal` at 0, `low` above 0: a smaller number runs first."""
    return PRIORITY_NAMES[1 + (priority > 0) - (priority < 0)]


def queue_name(model: str, priority: int = 0) -> str:
    """The queue of shards of one model (in its canonical form) at one priority."""
    return f"pdbatch.{model_slug(model)}.{priority_name(priority)}"


def queue_names(model: str) -> list[str]:
    """All queues of shards of one model, most urgent first."""
    return [f"pdbatch.{model_slug(model)}.{name}" for name in PRIORITY_NAMES]


@lru_cache(maxsize=1024)
def model_slug(model: str) -> str:
    """A readable name that differs wherever the models differ: `smollm2-135m-1f0c9a3e`."""
    base = re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    return f"{base[:40] or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


@lru_cache(maxsize=1024)
def canonical_model(name: str) -> str:
    """The one name of a model: a path becomes absolute, an alias or a hub's name stays."""
    if _PATH_LIKE.search(name):
        return str(Path(name).expanduser().resolve())
    folder = Path(name)
    if "/" in name and folder.exists():
        return str(folder.resolve())
    return str(folder.resolve()) if (folder / "config.json").is_file() else name


def client_url(url: str) -> str:
    """The broker's URL as redis-py spells it (Celery writes `redis+socket` for `unix`)."""
    if url.startswith("redis+socket://"):
        return "unix://" + url.removeprefix("redis+socket://").replace("virtual_host=", "db=")
    return url.replace("valkey://", "redis://", 1) if url.startswith("valkey://") else url


def connect(url: str, *, timeout_s: float = 5.0) -> Redis:
    """A Redis client for `url`; contacts nobody yet. Raises QueueError for a foreign URL."""
    import redis

    try:
        return redis.Redis.from_url(
            client_url(url),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=10,
        )
    except ValueError as error:
        raise QueueError(
            f"{_without_password(url)} is no Redis URL: {error}",
            remedy="Set PDBATCH_BROKER_URL to redis://host:port/0, rediss:// or redis+socket://.",
        ) from error


def check_redis(url: str, *, timeout_s: float = 5.0) -> str:
    """The server's version. Raises QueueError if it is unreachable or older than 6.2."""
    import redis

    shown = _without_password(url)
    client = connect(url, timeout_s=timeout_s)
    try:
        version = str(client.info("server")["redis_version"])
    except redis.AuthenticationError as error:
        raise QueueError(
            f"Redis at {shown} refused the password: {error}",
            remedy="Put it into the URL: redis://:password@host:port/0.",
        ) from error
    except (redis.RedisError, OSError) as error:
        raise QueueError(
            f"Redis at {shown} cannot be reached: {error}",
            remedy="Start it, or unset PDBATCH_BROKER_URL to use the embedded one.",
        ) from error
    finally:
        client.close()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_REDIS:
        raise QueueError(
            f"Redis at {shown} is version {version}; pdbatch needs 6.2 or newer",
            remedy="Upgrade it (Valkey serves too), or unset PDBATCH_BROKER_URL.",
        )
    return version


def _without_password(url: str) -> str:
    return re.sub(r"://[^@/]*@", "://***@", url)
