"""A Redis server of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pdbatch.local.redis import server_argv, socket_url, wait_for_redis


class RedisServer:
    """One server that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = socket_url(self.socket)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.process = subprocess.Popen(server_argv(self.socket), stdout=subprocess.DEVNULL)
        wait_for_redis(self.url)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
