"""Reads of 1 MiB requests beside `ib_read_bw`, in the same boot and in turns.

Both ends of either are processes of this machine. Every other thing on the host disturbs both, so
the best of several turns counts.
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

from kvxfer import KVConsumer, KVDescriptor, KVLayout, Region
from kvxfer.transports.rdma import RdmaTransport

REQUEST_BYTES = 1 << 20
NUM_REQUESTS = 32
TURNS = 5
ADDRESS = "192.0.2.1"
LAYOUT = KVLayout(
    model="m",
    dtype="uint8",
    itemsize=1,
    block_size=1,
    num_layers=1,
    num_kv_heads=1,
    head_dim=REQUEST_BYTES // 2,
)
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


@contextmanager
def producing(table: list[int]) -> Iterator[KVDescriptor]:
    code = PRODUCER.format(layout=LAYOUT, blocks=NUM_REQUESTS, table=table)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield KVDescriptor.from_json(process.stdout.readline())
        process.kill()


def ib_read_bw() -> float:
    """MB/s of perftest."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = ["ib_read_bw", "-d", "rxe0", "-s", str(REQUEST_BYTES), "-n", str(NUM_REQUESTS)]
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
    found = re.search(rf"^ {REQUEST_BYTES}\s+{NUM_REQUESTS}\s+\S+\s+(\S+)", done.stdout, re.M)
    assert found is not None, done.stdout
    return float(found[1]) * 1000 / 8


def test_reads_are_as_fast_as_the_devices_own_benchmark() -> None:
    rng = random.Random(1)
    table = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    pool = Region(NUM_REQUESTS, REQUEST_BYTES)
    consumer = KVConsumer(pool, [RdmaTransport("open sesame")], layout=LAYOUT)
    ours, theirs = [], []
    with producing(table) as found:
        into = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS)
        consumer.pull(found, into, timeout_s=60)  # connects and registers
        for _ in range(TURNS):
            theirs.append(ib_read_bw())
            stats = consumer.pull(found, into, timeout_s=60)
            ours.append(stats.num_bytes / stats.seconds / 1e6)
    consumer.close()
    said = f"MB/s: kvxfer {[round(x, 1) for x in ours]}, ib_read_bw {[round(x, 1) for x in theirs]}"
    print(said, f"best {max(ours) / max(theirs):.2f}")
    assert max(ours) >= 0.9 * max(theirs), said
