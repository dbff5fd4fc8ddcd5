"""Other processes for the suites: producers to be killed and stopped, readers that vanish."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from kvxfer import KVLayout

TABLE = [1, 2]
"""The blocks that a producing peer has pinned; they are full of ones."""


class Peer:
    """A process of this machine that runs `code`. Killed at the end of `with`.

    Subclass it for another machine: `line`, `say`, `kill`, `stop`, `go_on` are all that suites use.
    """

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Its process id, on its machine."""
        return self._process.pid

    def line(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        found = self._process.stdout.readline().strip()
        assert found, "the other process said nothing"
        return found

    def say(self, text: str) -> None:
        """One line for it to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread of it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        tasks = Path(f"/proc/{self.pid}/task")
        while not all(
            (task / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
            for task in tasks.iterdir()
        ):
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)


def producer_code(code: str, layout: KVLayout) -> str:
    """Serves a region of ones until it is killed; says its descriptor first."""
    return _PRODUCER.format(code=code, layout=repr(layout), table=TABLE)


def reader_code(code: str, layout: KVLayout) -> str:
    """Hears a descriptor of two blocks, says "reading" after the first pull, goes on pulling."""
    return _READER.format(code=code, layout=repr(layout))


_PRODUCER = """
import sys
from kvxfer import *
from kvxfer.testing.memory import write_block
make_region = Region
{code}
layout = {layout}
region = make_region(8, layout.block_bytes)
for block in range(8):
    write_block(region, block, bytes([1]) * layout.block_bytes)
producer = KVProducer(region, [transport], layout=layout, producer="p#1", host="here", epoch=1)
print(producer.pin("x", {table}, range(2 * layout.block_size)).to_json().decode(), flush=True)
sys.stdin.read()
"""

_READER = """
import sys
from kvxfer import *
make_region = Region
{code}
layout = {layout}
region = make_region(8, layout.block_bytes)
consumer = KVConsumer(region, [transport], layout=layout)
descriptor = KVDescriptor.from_json(sys.stdin.readline())
consumer.pull(descriptor, [0, 1])
print("reading", flush=True)
while True:
    consumer.pull(descriptor, [0, 1])
"""
