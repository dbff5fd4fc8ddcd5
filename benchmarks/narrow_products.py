"""Products with weights of 8 and 4 bits on a GPU, beside bfloat16's: microseconds and shares.

    python benchmarks/narrow_products.py [--sweep TILE:ROWS …]

The four products of a layer of Llama-3-8B, each over so many copies of its weight that no cache
has one, in a CUDA graph. --sweep tries ways to cut them, compiled by several processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pdbatch.engine.kernels import narrow, widening
from pdbatch.engine.quantization.cuts import Tiles, cut
from pdbatch.engine.quantization.packed import pack
from pdbatch.engine.quantization.rounding import rounded

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Outputs and inputs."""
_CACHE_BYTES = 200e6


class Weights:
    """Copies of one weight in all its forms, too many for a cache."""

    def __init__(self, outputs: int, inputs: int, bits: int) -> None:
        torch.manual_seed(0)
        self.plain_NK = torch.randn(outputs, inputs, device="cuda").bfloat16() * inputs**-0.5
        self.rounded = rounded(self.plain_NK, bits)
        first = pack(self.rounded)
        size = sum(part.nbytes for part in first)
        self.bytes = size
        self.copies = [
            (*(part.clone() for part in first), torch.zeros(4096, dtype=torch.int32, device="cuda"))
            for _ in range(max(2, int(_CACHE_BYTES / size) + 1))
        ]
        plain_bytes = self.plain_NK.nbytes
        self.plains = [
            self.plain_NK.clone() for _ in range(max(2, int(_CACHE_BYTES / plain_bytes)))
        ]


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Microseconds of one call, of several in a captured graph: the least of some replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(repeats):
        events: list[Any] = [_event() for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        best = min(best, events[0].elapsed_time(events[1]) * 1e3 / len(calls))
    return best


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def product_us(weights: Weights, x_MK: torch.Tensor, tiles: Tiles) -> float:
    """Of our kernel."""
    out = x_MK.new_empty(x_MK.shape[0], weights.plain_NK.shape[0])
    part = functools.partial
    return graph_us(
        [
            part(narrow.product, x_MK, q, scales, out, tiles, arrived)
            for q, scales, arrived in weights.copies
        ]
    )


def plain_us(weights: Weights, x_MK: torch.Tensor) -> float:
    """Of cuBLAS in bfloat16."""
    return graph_us([functools.partial(F.linear, x_MK, one) for one in weights.plains])


def widened_us(weights: Weights, x_MK: torch.Tensor) -> float:
    """Of widening into bfloat16 and cuBLAS."""
    scratch = torch.empty_like(weights.plain_NK)

    def call(q: torch.Tensor, scales: torch.Tensor) -> None:
        widening.widen(q, scales, scratch)
        F.linear(x_MK, scratch)

    return graph_us([functools.partial(call, q, scales) for q, scales, _ in weights.copies])


def torch_us(weights: Weights, x_MK: torch.Tensor, bits: int) -> float | str:
    """Of torch's own kernel, where it has one here."""
    outputs, inputs = weights.plain_NK.shape
    ops: Any = torch.ops.aten
    more: tuple[Any, ...]
    try:
        if bits == 4:
            q = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
            packed = ops._convert_weight_to_int4pack(q, 8)
            scales = torch.ones(inputs // 128, outputs, 2, device="cuda").bfloat16()
            product, more = ops._weight_int4pack_mm, (128, scales)
        else:
            packed = torch.zeros(outputs, inputs, dtype=torch.int8, device="cuda")
            product, more = (
                ops._weight_int8pack_mm,
                (torch.ones(outputs, device="cuda").bfloat16(),),
            )
        copies = [packed.clone() for _ in weights.copies]
        return graph_us([functools.partial(product, x_MK, one, *more) for one in copies])
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0][:40]


def relative_error(weights: Weights, x_MK: torch.Tensor, tiles: Tiles) -> float:
    """Of our kernel against float64, as a share of the outputs' spread."""
    inputs = x_MK.shape[1]
    want = x_MK.double() @ weights.rounded.numbers(inputs).double().T
    out = x_MK.new_empty(x_MK.shape[0], weights.plain_NK.shape[0])
    q, scales, arrived = weights.copies[0]
    narrow.product(x_MK, q, scales, out, tiles, arrived)
    assert not arrived.any()
    return float((out.double() - want).std() / want.std())


def _candidates(rows: int) -> list[Tiles]:
    """Ways to cut, without shares, which need no compilation of their own."""
    small = [(64, 4), (128, 4), (128, 8)] if rows <= 32 else [(64, 4), (128, 8)]
    small = [(64, 4), (128, 8), (256, 8)] if rows >= 128 else small
    stages = (3, 5) if rows <= 16 else (3, 4) if rows <= 32 else (3,)
    return [
        Tiles(rows=rows, outputs=outputs, shares=1, swap=swap, warps=warps, stages=stage)
        for (outputs, warps), swap, stage in itertools.product(small, (False, True), stages)
        if not (swap and outputs == 64 and warps == 8)
    ]


def _compile(job: tuple[int, Tiles]) -> float:
    bits, tiles = job
    start_s = time.perf_counter()
    outputs, inputs = 256, 2048
    q = torch.zeros(16, outputs, 16 * bits, dtype=torch.uint8, device="cuda")
    kind = torch.int32 if bits == 4 else torch.float32
    scales = torch.zeros((16, outputs) if bits == 4 else (outputs,), dtype=kind, device="cuda")
    arrived = torch.zeros(64, dtype=torch.int32, device="cuda")
    x = torch.zeros(1, inputs, device="cuda").bfloat16()
    out = torch.empty(1, outputs, device="cuda").bfloat16()
    for shares in (1, 2):
        narrow.product(x, q, scales, out, dataclasses.replace(tiles, shares=shares), arrived)
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def sweep(row_counts: list[tuple[int, int]]) -> None:
    """The best cuts of each product, for (rows of a program, rows)."""
    tiles = dict.fromkeys(one for rows, _ in row_counts for one in _candidates(rows))
    jobs = list(itertools.product((4, 8), tiles))
    start_s = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(_compile, jobs, chunksize=1)
    print(f"{len(jobs)} compiled in {time.perf_counter() - start_s:.0f} s", flush=True)
    for bits, (name, shape) in itertools.product((4, 8), SHAPES.items()):
        weights = Weights(*shape, bits)
        for rows, count in row_counts:
            print(f"wint{bits} {name} rows {count}: {_best(weights, rows, count)}", flush=True)


def _best(weights: Weights, rows: int, count: int) -> str:
    """Times of the best cuts for so many rows, in words."""
    outputs, inputs = weights.plain_NK.shape
    x_MK = torch.randn(count, inputs, device="cuda").bfloat16()
    found = []
    for one, shares in itertools.product(_candidates(rows), (1, 2, 3, 4, 6, 8, 12, 16)):
        programs = -(-outputs // one.outputs) * -(-count // rows) * shares
        if programs > 2500 or (programs < 100 and shares < 16):
            continue
        tiles = dataclasses.replace(one, shares=shares)
        found.append((product_us(weights, x_MK, tiles), tiles))
    found.sort(key=lambda pair: pair[0])
    swapped = [min(us for us, tiles in found if tiles.swap == swap) for swap in (False, True)]
    shown = [
        f"{us:.1f}us outputs={c.outputs} shares={c.shares} swap={c.swap:d} warps={c.warps}"
        f" stages={c.stages}"
        for us, c in found[:3]
    ]
    return (
        f"bfloat16 {plain_us(weights, x_MK):.1f}us, by swap {swapped[0]:.1f} {swapped[1]:.1f},"
        f" error {relative_error(weights, x_MK, found[0][1]):.1e}; " + " | ".join(shown)
    )


def table() -> None:
    """Our cuts beside bfloat16, widening first, and torch's own, at several numbers of rows."""
    print("us: bfloat16, ours (GB/s, TFLOP/s), widened first, torch's own; error of ours")
    for bits, (name, (outputs, inputs)) in itertools.product((4, 8), SHAPES.items()):
        weights = Weights(outputs, inputs, bits)
        for count in (1, 4, 16, 64):
            x_MK = torch.randn(count, inputs, device="cuda").bfloat16()
            tiles = cut(bits, count, outputs, -(-inputs // 128))
            us = product_us(weights, x_MK, tiles)
            own = torch_us(weights, x_MK, bits) if count <= 64 else "-"
            own = f"{own:.1f}" if isinstance(own, float) else own
            plain, wide = plain_us(weights, x_MK), widened_us(weights, x_MK)
            rate, flops = weights.bytes / us / 1e3, 2 * outputs * inputs * count / us / 1e6
            print(
                f"wint{bits} {name:7s} {count:4d} rows: {plain:6.1f} {us:6.1f}"
                f" ({rate:5.0f}, {flops:4.0f}) {wide:6.1f} {own};"
                f" {relative_error(weights, x_MK, tiles):.1e}",
                flush=True,
            )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sweep",
        metavar="TILE:ROWS",
        nargs="+",
        help="Try ways to cut so many rows in tiles, for example 16:1 16:16 64:64.",
    )
    asked = parser.parse_args().sweep
    if asked:
        sweep([(int(tile), int(rows)) for tile, _, rows in (one.partition(":") for one in asked)])
    else:
        table()


if __name__ == "__main__":
    main()
