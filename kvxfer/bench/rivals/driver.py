"""Starts a rival's two ends and gives out the turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvxfer.bench.case import Case
from kvxfer.errors import KVUsageError

OURS = {
    "mooncake": os.environ.get("MOONCAKE_PROTOCOL", "tcp"),
    "nixl": "tcp",
    "nixl-any": "shm",
}
"""Each rival, and our transport that does the same. `nixl-any`: UCX takes what it thinks best."""
_ENV = {
    "mooncake": {"MC_LOG_LEVEL": "ERROR"},
    "nixl": {"UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "WARN"},
    "nixl-any": {"NIXL_LOG_LEVEL": "WARN"},
}
"""What pins them to that transport, and keeps them quiet."""


class Rival:
    """Both ends of one, from `starting` to its end."""

    def __init__(self, name: str, python: str, pool_bytes: int) -> None:
        self.name = name
        self._ends: list[subprocess.Popen[str]] = []
        self._start(python)
        self._start(python)
        source, self._reader = self._ends
        self._say(source, {"role": "serve", "pool_bytes": pool_bytes})
        remote = json.loads(self._hear(source))
        self._say(self._reader, {"role": "read", "pool_bytes": pool_bytes, "remote": remote})
        self._hear(self._reader)

    def load(self, case: Case) -> None:
        """What the turns move from now on."""
        self._signal(signal.SIGCONT)
        self._say(self._reader, {"block_bytes": case.block_bytes, "tables": case.tables})
        self._hear(self._reader)
        self._signal(signal.SIGSTOP)

    def turn(self, number: int) -> float:
        """Its own seconds."""
        self._signal(signal.SIGCONT)
        self._say(self._reader, number)
        found = float(self._hear(self._reader))
        self._signal(signal.SIGSTOP)
        return found

    def close(self) -> None:
        """Kill both ends."""
        for process in self._ends:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self, python: str) -> None:
        script = Path(__file__).with_name(f"with_{self.name.partition('-')[0]}.py")
        self._ends.append(
            subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **_ENV[self.name]},
            )
        )

    def _say(self, process: subprocess.Popen[str], what: Any) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_hear` tells
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    def _hear(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise KVUsageError(
                f"{self.name} ended with {process.wait()}: what it said stands above; is it "
                "installed in the Python that --peer-python names?"
            )
        return line

    def _signal(self, number: signal.Signals) -> None:
        for process in self._ends:
            process.send_signal(number)


@contextmanager
def starting(
    names: Sequence[str], pythons: dict[str, str], pool_bytes: int
) -> Iterator[list[Rival]]:
    """All of them. Raises KVUsageError for one that does not start."""
    found: list[Rival] = []
    try:
        for name in names:
            found.append(Rival(name, pythons[name], pool_bytes))
        yield found
    finally:
        for rival in found:
            rival.close()
