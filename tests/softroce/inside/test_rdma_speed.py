"""Reads beside `ib_read_bw`, at the same size of requests, in the same boot and in turns.

Both ends of either are processes of this machine. Every other thing on the host disturbs both, so
several turns count, and there are more of them while one of the two was unlucky.
"""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import pytest

from kvxfer import KVConsumer, KVDescriptor, KVLayout, Region
from kvxfer.transports.rdma import RdmaTransport

TOTAL_BYTES = 32 << 20
LEAST_TURNS, MOST_TURNS = 4, 16
PRODUCER = """
import sys
from kvxfer import *
from kvxfer.transports.rdma import RdmaTransport
layout = {layout!r}
region = Region({blocks}, layout.block_bytes)
region.buffer[:] = bytes(range(256)) * (region.num_bytes >> 8)
way = RdmaTransport("open sesame")
producer = KVProducer(region, [way], layout=layout, producer="p#1", host="here", epoch=1)
print(producer.pin("x", {table!r}, range({blocks})).to_json().decode(), flush=True)
sys.stdin.read()
"""


def layout_of(block_bytes: int) -> KVLayout:
    return KVLayout(
        model="m",
        dtype="uint8",
        itemsize=1,
        block_size=1,
        num_layers=1,
        num_kv_heads=1,
        head_dim=block_bytes // 2,
    )


@contextmanager
def producing(layout: KVLayout, table: list[int]) -> Iterator[KVDescriptor]:
    code = PRODUCER.format(layout=layout, blocks=len(table), table=table)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield KVDescriptor.from_json(process.stdout.readline())
        process.kill()


def ib_read_bw(request_bytes: int) -> float:
    """MB/s of perftest."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    count = TOTAL_BYTES // request_bytes
    words = ["ib_read_bw", "-d", "rxe0", "-s", str(request_bytes), "-n", str(count)]
    words += ["-F", "-p", port, "--report_gbits"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run([*words, "127.0.0.1"], capture_output=True, text=True)
            if done.returncode == 0:
                break
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.2)
    finally:
        server.kill()
        server.wait()
    found = re.search(rf"^ {request_bytes}\s+{count}\s+\S+\s+(\S+)", done.stdout, re.M)
    assert found is not None, done.stdout
    return float(found[1]) * 1000 / 8


@pytest.mark.parametrize("request_bytes", [1 << 20, 64 << 10])
def test_reads_are_as_fast_as_the_devices_own_benchmark(request_bytes: int) -> None:
    rng, count = random.Random(1), TOTAL_BYTES // request_bytes
    layout = layout_of(request_bytes)
    table, into = (rng.sample(range(count), count) for _ in range(2))
    consumer = KVConsumer(
        Region(count, request_bytes), [RdmaTransport("open sesame")], layout=layout
    )
    ours: list[float] = []
    theirs: list[float] = []
    with producing(layout, table) as found:
        consumer.pull(found, into, timeout_s=60)  # connects and registers
        for turn in range(MOST_TURNS):
            theirs.append(ib_read_bw(request_bytes))
            stats = consumer.pull(found, into, timeout_s=60)
            ours.append(stats.num_bytes / stats.seconds / 1e6)
            if turn + 1 >= LEAST_TURNS and _share(ours, theirs) >= 0.9:
                break
    consumer.close()
    said = f"MB/s: kvxfer {[round(x, 1) for x in ours]}, ib_read_bw {[round(x, 1) for x in theirs]}"
    print(f"{request_bytes >> 10} KiB, {said}: {_share(ours, theirs):.2f}")
    assert _share(ours, theirs) >= 0.9, said


def _share(ours: list[float], theirs: list[float]) -> float:
    """By the best turns or by the middle ones, whichever were disturbed less alike."""
    return max(max(ours) / max(theirs), median(ours) / median(theirs))
