"""Other processes for the suites: producers to be killed and stopped, readers that vanish."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvxfer import KVDescriptor, KVLayout

TABLE = [1, 2]
"""The blocks that a producing peer has pinned; they are full of ones."""


@contextmanager
def producing(code: str, layout: KVLayout) -> Iterator[tuple[subprocess.Popen[str], KVDescriptor]]:
    """A process with a served region; `code` binds `transport` in it."""
    text = _PEER.format(code=code, layout=repr(layout), table=TABLE)
    with _running(text) as process:
        yield process, KVDescriptor.from_json(line(process))


@contextmanager
def reading(
    code: str, layout: KVLayout, descriptor: KVDescriptor
) -> Iterator[subprocess.Popen[str]]:
    """A process that pulls the descriptor's two blocks again and again."""
    with _running(_READER.format(code=code, layout=repr(layout))) as process:
        assert process.stdin is not None
        process.stdin.write(descriptor.to_json().decode() + "\n")
        process.stdin.flush()
        assert line(process) == "reading"
        yield process


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is gone."""
    process.kill()
    process.wait()


def stop(process: subprocess.Popen[str]) -> None:
    """SIGSTOP, and wait until every thread of it has stopped."""
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    tasks = Path(f"/proc/{process.pid}/task")
    while not all(
        (task / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
        for task in tasks.iterdir()
    ):
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.001)


def line(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    assert found, "the other process said nothing"
    return found


@contextmanager
def _running(text: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        kill(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


_PEER = """
import sys
from kvxfer import *
{code}
layout = {layout}
region = Region(8, layout.block_bytes)
region.buffer[:] = bytes([1]) * len(region.buffer)
producer = KVProducer(region, [transport], layout=layout, producer="p#1", host="here", epoch=1)
print(producer.pin("x", {table}, range(2 * layout.block_size)).to_json().decode(), flush=True)
sys.stdin.read()
"""

_READER = """
import sys
from kvxfer import *
{code}
layout = {layout}
consumer = KVConsumer(Region(8, layout.block_bytes), [transport], layout=layout)
descriptor = KVDescriptor.from_json(sys.stdin.readline())
consumer.pull(descriptor, [0, 1])
print("reading", flush=True)
while True:
    consumer.pull(descriptor, [0, 1])
"""
