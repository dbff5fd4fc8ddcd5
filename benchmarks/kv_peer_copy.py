"""KV between two GPUs of one machine: `cuda_ipc` against the link, and beside a decode step.

    python benchmarks/kv_peer_copy.py [--device-a cuda:0] [--device-b cuda:1] [--sweep] [--json F]

Two processes: the peer has a pool on device B and pins tables of scattered blocks; this one pulls
them into scattered blocks of its own pool on device A. The KV has the shape of Llama-3-8B (32
layers, 8 KV heads of 128, bfloat16). With one GPU both may be the same.

    limit     a contiguous copy of 1 GiB out of the peer's pool, in turn with the pulls
    pull      `KVConsumer.pull` by the clock: plan, copy, wait, proof; its median
    device    the copy alone, between two events on its stream; `call_us` of that is what it takes
              to give the whole read to the driver, most of it while bytes move already
    both      two threads that pull at once, as an engine's do: bytes of both by the clock
    parts     half of the heads, as a rank of two takes them: many short pieces
    step      a decode step (256 sequences; products and attention of such a model in a CUDA
              graph) alone, and while one thread pulls without a pause: as fast as it can, then
              by the kernel, then at most PACE bytes/s on average

Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from decode_step import DecodeStep
from kv_peer import (
    GIB,
    NUM_TABLES,
    ORDERS,
    PACE,
    TOKEN_BYTES,
    Bench,
    blocks,
    endpoint,
    half_of_heads,
    on_device,
    serve,
)
from kv_peer_sweep import sweep

from kvxfer import KVConsumer, KVDescriptor
from kvxfer.cuda.driver import driver
from kvxfer.cuda.lanes import Lane
from kvxfer.cuda.memory import cuda_tensor
from kvxfer.cuda.mover import By, start
from kvxfer.layout import Order
from kvxfer.plan import Move, ReadPlan, whole_blocks
from kvxfer.transports.cuda_ipc import CudaIpcTransport


def measure_limit(bench: Bench, peer: int) -> float:
    """GB/s of one long copy."""
    mine, size = bench.pool.data_ptr(), min(GIB, len(bench.pool))

    def copy(lane: Lane, turn: int) -> None:
        driver().copy(mine, peer, size, lane.stream)

    return size / on_device(bench, 9, copy) / 1e9


def measure_pull(bench: Bench, size: int, order: Order, length: int) -> dict[str, Any]:
    """One row of the table."""
    consumer, found = bench.consumer(size, order), bench.told[f"{size} {order} {length}"]
    into = bench.tables(size, length)
    for turn in range(NUM_TABLES):
        consumer.pull(found[turn], into[turn])
    assert_equal(bench, size, order, length)
    seconds = []
    for turn in range(bench.rounds):
        begun = time.perf_counter()
        consumer.pull(found[turn % NUM_TABLES], into[turn % NUM_TABLES])
        seconds.append(time.perf_counter() - begun)
    peer, mine = bench.pool_of_peer(size, order), bench.pool.data_ptr()
    plans = [
        whole_blocks(blocks(a), b, size * TOKEN_BYTES) for a, b in zip(found, into, strict=True)
    ]
    by: By = "auto" if bench.peer_device_differs else "kernel"
    calls: list[float] = []

    def copy(lane: Lane, turn: int) -> None:
        begun = time.perf_counter()
        start(lane, plans[turn % NUM_TABLES], peer, mine, by, split=True)
        calls.append(time.perf_counter() - begun)
        lane.join()

    device = on_device(bench, bench.rounds, copy)
    both = measure_both(bench, consumer, found, into)
    num_bytes = length * TOKEN_BYTES
    rates = {
        "pull": num_bytes / median(seconds) / 1e9,
        "device": num_bytes / device / 1e9,
        "both": num_bytes / both / 1e9,
    }
    row: dict[str, Any] = {"tokens": length, "block_size": size, "order": order}
    row["pull_us"], row["device_us"] = round(median(seconds) * 1e6, 1), round(device * 1e6, 1)
    row["call_us"] = round(median(calls) * 1e6, 1)
    for name, rate in rates.items():
        row[f"{name}_gb_per_s"] = round(rate, 1)
        row[f"{name}_of_limit"] = round(rate / bench.limit_gb_per_s, 3)
    return row


def measure_both(
    bench: Bench, consumer: KVConsumer, found: list[KVDescriptor], into: list[list[int]]
) -> float:
    """Seconds a pull of two threads at once, each with its own half of the tables."""
    count = bench.rounds // 2

    def run(half: int) -> None:
        for turn in range(count):
            which = half * (NUM_TABLES // 2) + turn % (NUM_TABLES // 2)
            consumer.pull(found[which], into[which])

    threads = [threading.Thread(target=run, args=(half,)) for half in range(2)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - begun) / (2 * count)


def assert_equal(bench: Bench, size: int, order: Order, length: int) -> None:
    """The last table's blocks are the peer's: the engines' plain copies say so."""
    import torch

    consumer, found = bench.consumer(size, order), bench.told[f"{size} {order} {length}"]
    into, block = bench.tables(size, length)[0], size * TOKEN_BYTES
    consumer.pull(found[0], into)
    peer = bench.pool_of_peer(size, order)
    there = torch.empty(block, dtype=torch.uint8, device=bench.device)
    consumer.pull(found[0], into)
    for source, mine in list(zip(blocks(found[0]), into, strict=True))[:4]:
        on_device(
            bench,
            1,
            lambda lane, turn, at=source: driver().copy(
                there.data_ptr(), peer + at * block, block, lane.stream
            ),
        )
        assert torch.equal(there, bench.pool[mine * block : (mine + 1) * block]), (source, mine)


def measure_parts(bench: Bench, size: int, order: Order, length: int) -> dict[str, Any]:
    """Half of the heads."""
    peer, mine = bench.pool_of_peer(size), bench.pool.data_ptr()
    spans = half_of_heads(size, order)
    block = size * TOKEN_BYTES
    row: dict[str, Any] = {"tokens": length, "block_size": size, "order": order}
    row["piece_bytes"] = spans[0].num_bytes
    found, into = bench.told[f"{size} {order} {length}"], bench.tables(size, length)
    plans = [
        ReadPlan(
            tuple(blocks(a)),
            (Move(spans, tuple(zip(blocks(a), b, strict=True))),),
            block,
            block // 2,
        )
        for a, b in zip(found, into, strict=True)
    ]
    for by in ("kernel", "engines"):
        if by == "engines" and len(spans) * len(plans[0].src_blocks) > 20_000:
            continue
        rounds = bench.rounds if by == "kernel" else 5
        seconds = on_device(
            bench, rounds, lambda lane, turn, by=by: start(lane, plans[turn % 8], peer, mine, by)
        )
        rate = plans[0].num_bytes / seconds / 1e9
        row[f"{by}_gb_per_s"] = round(rate, 1)
        row[f"{by}_of_limit"] = round(rate / bench.limit_gb_per_s, 3)
    return row


# --- beside a decode step


def measure_steps(bench: Bench, size: int, lengths: list[int], steps: int) -> list[dict[str, Any]]:
    """Alone and beside pulls, in turn, so that a warm device is no excuse."""
    step = DecodeStep(bench.device)
    step.milliseconds(10)
    rows = []
    for by, pace in (("auto", 0.0), ("kernel", 0.0), ("auto", PACE)):
        for length in lengths:
            alone, beside, rates = [], [], []
            for _ in range(3):
                alone += step.milliseconds(steps)
                with Pulling(bench, size, length, by, pace) as pulling:
                    beside += step.milliseconds(steps)
                rates.append(pulling.gb_per_s)
            slower = median(beside) / median(alone) - 1
            rows.append(
                {
                    "by": by,
                    "most_gb_per_s": pace / 1e9,
                    "tokens": length,
                    "alone_ms": round(median(alone), 3),
                    "beside_ms": round(median(beside), 3),
                    "slower": round(slower, 4),
                    "pull_gb_per_s": round(median(rates), 1),
                }
            )
    return rows


class Pulling:
    """A thread that pulls without a pause."""

    def __init__(self, bench: Bench, size: int, length: int, by: Any, pace: float) -> None:
        self._pace, self._bytes_per_s = bench.way.pace, pace
        self._stop = threading.Event()
        self._bench, self._size, self._length, self._by = bench, size, length, by
        self._thread = threading.Thread(target=self._run)
        self._count = 0
        self.gb_per_s = 0.0

    def __enter__(self) -> Pulling:
        opened: Any = self._bench.way._pool(
            endpoint(self._bench.told[f"{self._size} {ORDERS[0]} {self._length}"][0]),
            self._bench.ordinal,
            1,
        )
        self._direct, self._before = opened.way, opened.way._by
        if self._by != "auto":
            opened.way._by = self._by
        self._pace.bytes_per_s = self._bytes_per_s
        self._begun = time.perf_counter()
        self._thread.start()
        return self

    def _run(self) -> None:
        bench = self._bench
        consumer = bench.consumer(self._size, ORDERS[0])
        found = bench.told[f"{self._size} {ORDERS[0]} {self._length}"]
        into = bench.tables(self._size, self._length)
        while not self._stop.is_set():
            consumer.pull(found[self._count % NUM_TABLES], into[self._count % NUM_TABLES])
            self._count += 1

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        seconds = time.perf_counter() - self._begun
        self._direct._by, self._pace.bytes_per_s = self._before, 0
        self.gb_per_s = self._count * self._length * TOKEN_BYTES / seconds / 1e9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device-a", default="cuda:0", help="where this process's pool lies")
    parser.add_argument("--device-b", default=None, help="the peer's; the next GPU by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--pool-gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="decode steps of one turn; 0: none")
    parser.add_argument("--sweep", action="store_true", help="also shapes of the kernel and such")
    parser.add_argument("--json", type=Path, default=None, help="write the JSON there too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device_b is None:
        args.device_b = "cuda:1" if driver().num_devices > 1 else args.device_a
    return args


def main() -> None:
    args = arguments()
    pool_bytes = int(args.pool_gib * GIB)
    if args.serve:
        serve(args.device_b, pool_bytes, args.block_sizes, args.tokens)
        return
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    command += ["--device-b", args.device_b]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        report = measure(args, pool_bytes, peer)
    finally:
        peer.kill()
        peer.wait()
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def measure(args: argparse.Namespace, pool_bytes: int, peer: Any) -> dict[str, Any]:
    """The whole report, told on the way."""
    pool = cuda_tensor(pool_bytes, args.device_a)
    told = json.loads(peer.stdout.readline())
    found = {name: [KVDescriptor.from_json(t) for t in texts] for name, texts in told.items()}
    way = CudaIpcTransport("benchmark", host="here")
    bench = Bench(args.device_a, pool, found, way, args.rounds)
    bench.peer_device_differs = args.device_a != args.device_b
    size = args.block_sizes[0]
    report: dict[str, Any] = {"device_a": args.device_a, "device_b": args.device_b}
    address = bench.pool_of_peer(size)
    bench.limit_gb_per_s = measure_limit(bench, address)
    report["way"] = way._pool(endpoint(found[next(iter(found))][0]), bench.ordinal, 1).way.kind
    report["limit_gb_per_s"] = round(bench.limit_gb_per_s, 1)
    print(f"limit: {bench.limit_gb_per_s:.1f} GB/s; way: {report['way']}", flush=True)
    report["pulls"] = []
    for length in args.tokens:
        for block_size in args.block_sizes:
            for order in ORDERS:
                row = measure_pull(bench, block_size, order, length)
                report["pulls"].append(row)
                print(line(row), flush=True)
    report["limit_again_gb_per_s"] = round(measure_limit(bench, address), 1)
    report["parts"] = []
    for length in args.tokens:
        for order in ORDERS:
            row = measure_parts(bench, size, order, length)
            report["parts"].append(row)
            print("parts", line(row), flush=True)
    report["opened"], report["regions_of_peer"] = way.num_opened, len(args.block_sizes)
    print(f"opened {way.num_opened} times, {len(args.block_sizes)} regions", flush=True)
    if args.steps:
        report["steps"] = measure_steps(bench, size, args.tokens, args.steps)
        for row in report["steps"]:
            print("step", line(row), flush=True)
    if args.sweep:
        report["sweep"] = sweep(bench, size, args.tokens)
    way.close()
    return report


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


if __name__ == "__main__":
    main()
