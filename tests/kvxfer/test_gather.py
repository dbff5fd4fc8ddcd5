"""The gather kernel's table, walked as the kernel walks it; the kernel itself in an interpreter."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvxfer import Move, ReadPlan, Span, whole_blocks
from kvxfer.kernels.table import GROUP_WORDS, HEAD_WORDS, Table, encode

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_BLOCKS = 12


def walk(table: Table, source: bytes, destination: bytearray, bases: tuple[int, int]) -> int:
    """Row by row; the number of tiles of the largest group."""
    words, shape = table.words, table.shape
    most = 0
    for index in range(words[4]):
        at = HEAD_WORDS + GROUP_WORDS * index
        length, rows_of_span, num_spans, spans, num_pairs, pairs = words[at : at + 6]
        rows = rows_of_span * num_spans * num_pairs
        most = max(most, -(-rows // shape.rows))
        for row in range(rows):
            pair = pairs + 2 * (row // (rows_of_span * num_spans))
            rest = row % (rows_of_span * num_spans)
            span = spans + 2 * (rest // rows_of_span)
            within = rest % rows_of_span * shape.row_bytes
            src = words[0] + words[pair] * words[2] + words[span] + within
            dst = words[1] + words[pair + 1] * words[3] + words[span + 1] + within
            size = min(length - within, shape.row_bytes)
            assert size == shape.row_bytes or not shape.even
            assert src % shape.unit == dst % shape.unit == size % shape.unit == 0
            destination[dst - bases[1] : dst - bases[1] + size] = source[
                src - bases[0] : src - bases[0] + size
            ]
    return most


def plans(rng: random.Random) -> list[ReadPlan]:
    found = [
        whole_blocks(rng.sample(range(NUM_BLOCKS), 5), rng.sample(range(NUM_BLOCKS), 5), size)
        for size in (1, 8, 13, 4096, 26880, 65536)
    ]
    for unit in (1, 4, 16, 60, 512):
        targets = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        moves = []
        for _ in range(3):
            sizes = [rng.randint(1, 8) for _ in range(3)]
            spans = tuple(
                Span(rng.randint(0, 16 - size) * unit, 8 * unit * i, size * unit)
                for i, size in enumerate(sizes)
            )
            moves.append(
                Move(spans, tuple((rng.randrange(NUM_BLOCKS), targets.pop()) for _ in range(3)))
            )
        found.append(ReadPlan((), tuple(moves), 16 * unit, 24 * unit))
    found.append(ReadPlan((), (), 16, 16))
    return found


def test_a_table_says_what_the_plan_says() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(10):
        for plan in plans(rng):
            source = rng.randbytes(NUM_BLOCKS * plan.src_block_bytes)
            found = bytearray(NUM_BLOCKS * plan.dst_block_bytes)
            expected = bytearray(found)
            for src, dst, size in plan.pieces():
                expected[dst : dst + size] = source[src : src + size]
            bases = rng.choice([(1 << 40, 1 << 41), (4096 + 4, 8192), (17, 1 << 20)])
            table = encode(plan, *bases, tile_bytes=rng.choice([64, 1024, 32768]))
            assert walk(table, source, found, bases) == table.num_tiles
            assert found == expected, plan
            for number in (table.shape.row_bytes, table.shape.rows):
                assert number & (number - 1) == 0 and number > 0


def test_whole_blocks_go_in_long_rows_of_wide_accesses() -> None:
    shape = encode(whole_blocks([1, 2], [3, 4], 2 << 20), 1 << 40, 1 << 41).shape
    assert shape.unit == 16 and shape.row_bytes == 32768 and shape.even
    heads = Move((Span(0, 0, 1024), Span(2048, 1024, 1024)), ((0, 0),))
    shape = encode(ReadPlan((0,), (heads,), 4096, 2048), 1 << 40, 1 << 41).shape
    assert shape.unit == 16 and shape.row_bytes == 1024 and shape.rows == 32


def test_the_kernel_copies_what_the_plan_says() -> None:
    if find_spec("triton") is None:
        pytest.skip("no Triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", _INTERPRETED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


_INTERPRETED = """
import random
import torch
from kvxfer.kernels.gather import launch
from kvxfer.kernels.table import encode
from test_gather import NUM_BLOCKS, plans

seed = random.randrange(2**32)
print("seed", seed)
rng = random.Random(seed)
for plan in plans(rng):
    if plan.num_bytes > 100_000 or not plan.moves:
        continue
    source = torch.randint(0, 256, (NUM_BLOCKS * plan.src_block_bytes,), dtype=torch.uint8)
    found = torch.zeros(NUM_BLOCKS * plan.dst_block_bytes, dtype=torch.uint8)
    expected = found.clone()
    for src, dst, size in plan.pieces():
        expected[dst : dst + size] = source[src : src + size]
    for ahead in (True, False):
        found.zero_()
        table = encode(plan, source.data_ptr(), found.data_ptr(), tile_bytes=4096)
        words = torch.tensor(list(table.words), dtype=torch.int64)
        launch(words, table.shape, rng.randint(1, 4), ahead=ahead)
        assert torch.equal(found, expected), (plan, ahead)
"""
