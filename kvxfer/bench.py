"""Latency and bandwidth of every transport of this machine, beside the machine's own limit.

The producer of `shm` and `tcp` is another process. `limit` is a copy of as many bytes in memory for
`mem` and `shm`, and as many bytes through a plain socket on the loopback, from another process, for
`tcp`. Limit and transport take turns within one run, so that the ratio holds on a machine that
others use too. Both go through pools larger than the processor's caches, other blocks at each turn,
as an engine does; a transport's blocks are scattered at both ends, a limit's bytes are contiguous.
Figures are medians.
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
from kvxfer.transports import MemTransport, ShmTransport, TcpTransport
from kvxfer.transports.base import Transport

_SECRET = "bench"
_HOST = "bench-host"
_MIB = 1 << 20
_POOL_BYTES = 128 * _MIB
_MOST_TABLES = 32
Turn = Callable[[int], object]
"""Moves the bytes of one turn, given its number."""


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
    """Median of the ratios of neighbouring turns."""


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
    """All transports at one size."""
    count = max(1, transfer_bytes // block_bytes)
    num_blocks = max(2 * count, _POOL_BYTES // block_bytes)
    rng = random.Random(1)
    tables = [rng.sample(range(num_blocks), count) for _ in range(min(rounds, _MOST_TABLES))]
    into = [rng.sample(range(num_blocks), count) for _ in tables]
    total, pool = count * block_bytes, num_blocks * block_bytes
    mine = Region(num_blocks, block_bytes)
    mine.buffer[:] = bytes(pool)  # touched once, as an engine's pool is
    rows = []
    with _Peer(layout_of(block_bytes), num_blocks, tables) as peer:
        memory = _memory_copy(total, pool)
        for way, limit in (
            (MemTransport(), memory),
            (ShmTransport(_HOST), memory),
            (TcpTransport(_SECRET), peer.plain_copy(total, pool)),
        ):
            consumer = KVConsumer(mine, [way], layout=layout_of(block_bytes))
            descriptors = peer.descriptors
            if isinstance(way, MemTransport):
                descriptors = _local(way, layout_of(block_bytes), num_blocks, tables)

            def pull(
                turn: int, c: KVConsumer = consumer, d: list[KVDescriptor] = descriptors
            ) -> None:
                c.pull(d[turn % len(d)], into[turn % len(d)])

            rows.append(_row(way, total, block_bytes, *_take_turns(pull, limit, rounds)))
            consumer.close()
    return rows


def _take_turns(pull: Turn, limit: Turn, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each; the first round opens connections and mappings and does not count."""
    for turn in range(rounds):
        pull(turn)
        limit(turn)
    pulls, limits = [], []
    for turn in range(rounds):
        pulls.append(_time(pull, turn))
        limits.append(_time(limit, turn))
    return pulls, limits


def _row(
    way: Transport, total: int, block_bytes: int, pulls: list[float], limits: list[float]
) -> Row:
    pull, best = statistics.median(pulls), statistics.median(limits)
    ratio = statistics.median(b / p for p, b in zip(pulls, limits, strict=True))
    return Row(
        way.name,
        total / _MIB,
        block_bytes >> 10,
        round(pull * 1e3, 3),
        round(total / pull / 1e9, 2),
        round(total / best / 1e9, 2),
        round(ratio, 2),
    )


class _Peer:
    """The producer's process: a region with pinned tables, a plain socket that sends on request."""

    def __init__(self, layout: KVLayout, num_blocks: int, tables: list[list[int]]) -> None:
        text = _PEER.format(layout=repr(layout), num_blocks=num_blocks, host=_HOST, secret=_SECRET)
        self._process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(tables).encode() + b"\n")
        self._process.stdin.flush()
        self._port = int(self._process.stdout.readline())
        lines = [self._process.stdout.readline() for _ in tables]
        self.descriptors = [KVDescriptor.from_json(line) for line in lines]

    def plain_copy(self, size: int, pool: int) -> Turn:
        """`size` bytes from the peer's pool into one of ours."""
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target = memoryview(bytearray(pool))

        def copy(turn: int) -> None:
            start = _offset(turn, size, pool)
            sock.sendall(start.to_bytes(8, "big") + size.to_bytes(8, "big"))
            view = target[start : start + size]
            while len(view):
                view = view[sock.recv_into(view) :]

        return copy

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _local(
    way: MemTransport, layout: KVLayout, num_blocks: int, tables: list[list[int]]
) -> list[KVDescriptor]:
    """The same for `mem`: a region of this process."""
    region = Region(num_blocks, layout.block_bytes)
    region.buffer[:] = bytes([7]) * len(region.buffer)
    generations = (0,) * len(tables[0])
    return [
        KVDescriptor(
            id=str(turn),
            producer="here",
            host=_HOST,
            epoch=region.epoch,
            layout=layout.fingerprint,
            block_ids=tuple(table),
            generations=generations,
            num_tokens=len(table),
            token_hash="",
            num_bytes=len(table) * layout.block_bytes,
            endpoints={way.name: way.serve(region)},
        )
        for turn, table in enumerate(tables)
    ]


def _memory_copy(size: int, pool: int) -> Turn:
    source, target = ctypes.create_string_buffer(pool), ctypes.create_string_buffer(pool)
    ctypes.memset(source, 1, pool)
    ctypes.memset(target, 2, pool)
    from_, to = ctypes.addressof(source), ctypes.addressof(target)

    def copy(turn: int) -> None:
        start = _offset(turn, size, pool)
        ctypes.memmove(to + start, from_ + start, size)

    copy.keeps = source, target  # type: ignore[attr-defined]
    return copy


def _offset(turn: int, size: int, pool: int) -> int:
    """Through the pool from end to end."""
    return turn % max(1, pool // size) * size


def _time(work: Turn, turn: int) -> float:
    start = time.perf_counter()
    work(turn)
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m kvxfer bench", description=__doc__)
    parser.add_argument("--mib", type=float, nargs="+", default=[0.0625, 1, 16, 64])
    parser.add_argument("--block-kib", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=31)
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
import json, socket, sys, threading
from kvxfer import *
layout = {layout}
region = Region({num_blocks}, layout.block_bytes)
region.buffer[:] = bytes([7]) * len(region.buffer)
ways = [ShmTransport("{host}"), TcpTransport("{secret}")]
producer = KVProducer(region, ways, layout=layout, producer="p#1", host="{host}", epoch=1)
server = socket.create_server(("127.0.0.1", 0))
data = memoryview(bytearray(region.buffer))
tables = json.loads(sys.stdin.readline())
print(server.getsockname()[1], flush=True)
for turn, table in enumerate(tables):
    print(producer.pin(str(turn), table, range(len(table))).to_json().decode(), flush=True)
def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while head := sock.recv(16, socket.MSG_WAITALL):
        start, size = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
        sock.sendall(data[start : start + size])
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
