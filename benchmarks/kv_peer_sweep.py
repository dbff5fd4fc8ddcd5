"""Shapes of the gather kernel, streams for the copy engines, and what a call of each costs.

Part of `kv_peer_copy.py --sweep`: what the constants of `kvxfer.cuda.mover` were chosen by.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from kv_peer import ORDERS, TOKEN_BYTES, blocks, on_device

from kvxfer.cuda.driver import driver
from kvxfer.cuda.lanes import Lane
from kvxfer.plan import whole_blocks

ROUNDS = 30
SHAPES = [(32768, 8, True), (32768, 8, False), (16384, 4, True), (65536, 16, True)]
SHAPES += [(65536, 16, False), (16384, 4, False)]
PROGRAMS = (8, 16, 24, 32, 48, 64, 96, 132, 264)


@dataclass
class Case:
    """One length: block tables at both ends, and where the pools lie."""

    length: int
    block_bytes: int
    num_bytes: int
    pairs: list[list[tuple[int, int]]]
    peer: int
    mine: int
    lanes: list[Lane]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def engines(self, lane: Lane, turn: int, *, streams: int, batch: bool) -> None:
        """The copies dealt to so many streams, which the lane's waits for."""
        cuda, todo = driver(), self.pairs[turn % len(self.pairs)]
        ready = lane.record()
        for index in range(streams):
            stream = self.lanes[index].stream if index else lane.stream
            if index:
                cuda.follow(stream, ready)
            part = todo[index::streams]
            source = [self.peer + src * self.block_bytes for src, _ in part]
            to = [self.mine + dst * self.block_bytes for _, dst in part]
            if batch:
                sizes = array("Q", [self.block_bytes]) * len(part)
                cuda.copy_batch(array("Q", to), array("Q", source), sizes, stream)
            else:
                for at, into in zip(source, to, strict=True):
                    cuda.copy(into, at, self.block_bytes, stream)
            if index:
                cuda.follow(lane.stream, self.lanes[index].record())

    def gather(
        self, lane: Lane, turn: int, *, tables: Any, programs: int, warps: int, ahead: bool
    ) -> None:
        """The kernel in one shape."""
        import torch

        from kvxfer.kernels.gather import launch

        table = tables[turn % len(tables)]
        words = lane.table(table.words)
        stream = torch.cuda.ExternalStream(lane.stream, device=lane.device)
        with torch.cuda.stream(stream):
            count = min(programs, table.num_tiles)
            launch(words, table.shape, count, num_warps=warps, ahead=ahead)


def sweep(bench: Any, size: int, lengths: list[int]) -> list[dict[str, Any]]:
    """One row for each way and length."""

    rows: list[dict[str, Any]] = []
    peer, mine = bench.pool_of_peer(size), bench.pool.data_ptr()
    for length in lengths:
        found, into = bench.told[f"{size} {ORDERS[0]} {length}"], bench.tables(size, length)
        pairs = [list(zip(blocks(a), b, strict=True)) for a, b in zip(found, into, strict=True)]
        lanes = [Lane(bench.ordinal) for _ in range(4)]
        block_bytes = size * TOKEN_BYTES
        rows += _sweep(
            bench, Case(length, block_bytes, length * TOKEN_BYTES, pairs, peer, mine, lanes)
        )
        for lane in lanes:
            lane.close()
    return rows


def _sweep(bench: Any, case: Case) -> list[dict[str, Any]]:
    from kvxfer.kernels.table import encode

    for streams in (1, 2, 3, 4):
        for batch in (True, False):
            name = f"engines {'batch' if batch else 'single'} streams={streams}"
            _time(bench, case, name, partial(case.engines, streams=streams, batch=batch))
    plans = [
        whole_blocks([src for src, _ in pairs], [dst for _, dst in pairs], case.block_bytes)
        for pairs in case.pairs
    ]
    for tile, warps, ahead in SHAPES:
        tables = [encode(plan, case.peer, case.mine, tile_bytes=tile) for plan in plans]
        for programs in PROGRAMS:
            work = partial(case.gather, tables=tables, programs=programs, warps=warps, ahead=ahead)
            name = f"kernel tile={tile} warps={warps} ahead={ahead} programs={programs}"
            _time(bench, case, name, work)
    return case.rows


def _time(bench: Any, case: Case, name: str, work: Callable[[Lane, int], None]) -> None:

    calls: list[float] = []

    def measured(lane: Lane, turn: int) -> None:
        begun = time.perf_counter()
        work(lane, turn)
        calls.append(time.perf_counter() - begun)

    seconds = on_device(bench, ROUNDS, measured)
    rate = case.num_bytes / seconds / 1e9
    row = {"tokens": case.length, "how": name, "gb_per_s": round(rate, 1)}
    row["of_limit"] = round(rate / bench.limit_gb_per_s, 3)
    row["us"], row["call_us"] = round(seconds * 1e6, 1), round(median(calls) * 1e6, 1)
    case.rows.append(row)
    print("sweep", *row.values(), flush=True)
