"""Latency and bandwidth of every transport of this machine, beside the machine's own limit.

The producer is another process. `limit` is a copy of the same bytes in memory for `shm`, and the
same bytes through a plain socket on the loopback, from another process, for `tcp`; limit and
transport take turns within one run, so that the ratio holds on a machine that others use too.
Blocks are scattered at both ends. Figures are medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from kvxfer.consumer import KVConsumer
from kvxfer.descriptor import KVDescriptor
from kvxfer.layout import KVLayout
from kvxfer.region import Region
from kvxfer.transports import ShmTransport, TcpTransport

_SECRET = "bench"
_HOST = "bench-host"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    transport: str
    transfer_mib: float
    block_kib: int
    latency_ms: float
    """Median of a whole pull: the read and its proof."""
    gb_per_s: float
    limit_gb_per_s: float
    of_limit: float


def layout_of(block_bytes: int) -> KVLayout:
    """A layout whose blocks have so many bytes."""
    return KVLayout(
        model="bench",
        dtype="uint8",
        itemsize=1,
        block_size=1,
        num_layers=1,
        num_kv_heads=1,
        head_dim=block_bytes // 2,
    )


def measure(transfer_bytes: int, block_bytes: int, rounds: int) -> list[Row]:
    """Both transports at one size."""
    count = max(1, transfer_bytes // block_bytes)
    layout = layout_of(block_bytes)
    rng = random.Random(1)
    source = rng.sample(range(2 * count), count)
    into = rng.sample(range(2 * count), count)
    total = count * block_bytes
    rows = []
    mine = Region(2 * count, block_bytes)
    mine.buffer[:] = bytes(len(mine.buffer))  # touched once, as an engine's pool is
    with _Peer(layout, source) as peer:
        for way, limit in (
            (ShmTransport(_HOST), _memory_copy(total)),
            (TcpTransport(_SECRET), peer.plain_copy(total)),
        ):
            consumer = KVConsumer(mine, [way], layout=layout)
            pulls, limits = [], []
            for turn in range(rounds + 1):
                pull_s = _time(lambda c=consumer: c.pull(peer.descriptor, into))  # type: ignore[misc]
                limit_s = _time(limit)
                if turn:  # the first opens connections and mappings
                    pulls.append(pull_s)
                    limits.append(limit_s)
            consumer.close()
            pull, best = statistics.median(pulls), statistics.median(limits)
            ratio = statistics.median(b / p for p, b in zip(pulls, limits, strict=True))
            rows.append(
                Row(
                    way.name,
                    total / _MIB,
                    block_bytes >> 10,
                    round(pull * 1e3, 3),
                    round(total / pull / 1e9, 2),
                    round(total / best / 1e9, 2),
                    round(ratio, 2),
                )
            )
    return rows


class _Peer:
    """The producer's process: a pinned region, and a plain socket that sends on request."""

    def __init__(self, layout: KVLayout, blocks: list[int]) -> None:
        text = _PEER.format(layout=repr(layout), blocks=blocks, host=_HOST, secret=_SECRET)
        self._process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.descriptor = KVDescriptor.from_json(self._process.stdout.readline())
        self._port = int(self._process.stdout.readline())

    def plain_copy(self, size: int) -> Callable[[], object]:
        """`size` bytes from the peer into memory of ours."""
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target = memoryview(bytearray(size))

        def copy() -> None:
            sock.sendall(size.to_bytes(8, "big"))
            view = target
            while len(view):
                view = view[sock.recv_into(view) :]

        return copy

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _memory_copy(size: int) -> Callable[[], object]:
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memset(source, 1, size)
    return lambda: ctypes.memmove(target, source, size)


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m kvxfer bench", description=__doc__)
    parser.add_argument("--mib", type=float, nargs="+", default=[0.0625, 1, 16, 64])
    parser.add_argument("--block-kib", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = [
        row
        for mib in args.mib
        for kib in args.block_kib
        if kib * 1024 <= mib * _MIB
        for row in measure(int(mib * _MIB), kib << 10, args.rounds)
    ]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'':9}{'MiB':>8}{'block KiB':>11}{'ms':>10}{'GB/s':>8}{'limit':>8}{'share':>7}")
    for row in rows:
        print(
            f"{row.transport:9}{row.transfer_mib:8.2f}{row.block_kib:11d}{row.latency_ms:10.3f}"
            f"{row.gb_per_s:8.2f}{row.limit_gb_per_s:8.2f}{row.of_limit:7.2f}"
        )


_PEER = """
import socket, sys, threading
from kvxfer import *
layout = {layout}
blocks = {blocks}
region = Region(2 * len(blocks), layout.block_bytes)
region.buffer[:] = bytes([7]) * len(region.buffer)
ways = [ShmTransport("{host}"), TcpTransport("{secret}")]
producer = KVProducer(region, ways, layout=layout, producer="p#1", host="{host}", epoch=1)
server = socket.create_server(("127.0.0.1", 0))
data = memoryview(bytearray(region.buffer))
print(producer.pin("x", blocks, range(len(blocks))).to_json().decode(), flush=True)
print(server.getsockname()[1], flush=True)
def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while size := sock.recv(8, socket.MSG_WAITALL):
        sock.sendall(data[: int.from_bytes(size, "big")])
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
