"""Producers by the dozen: a process that has loaded everything forks one at a word.

A process that starts from nothing takes seconds under emulation; a child of this one does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from kvxfer import KVDescriptor, KVLayout

_CODE = """
import os, signal, sys, time
from kvxfer import *
from kvxfer.transports import rdma_verbs
from kvxfer.transports.rdma import RdmaTransport
rdma_verbs.load()
layout = {layout}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork():
        continue
    region = Region(8, layout.block_bytes)
    region.buffer[:] = bytes([1]) * len(region.buffer)
    way = RdmaTransport("open sesame")
    producer = KVProducer(region, [way], layout=layout, producer="p#1", host="here", epoch=1)
    tokens = range(2 * layout.block_size)
    described = producer.pin("x", [1, 2], tokens).to_json().decode()
    print(os.getpid(), described, flush=True)
    while True:
        time.sleep(3600)
"""


class Nursery:
    """Use as a context; the producers that are still there end with it."""

    def __init__(self, layout: KVLayout) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(layout=repr(layout))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def bear(self) -> tuple[int, KVDescriptor]:
        """(process id, what it has pinned: two blocks of ones)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("one\n")
        self._process.stdin.flush()
        pid, _, described = self._process.stdout.readline().partition(" ")
        return int(pid), KVDescriptor.from_json(described)


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        import select

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(10_000), "it does not die"
    finally:
        os.close(fd)
