"""Plans of reads: what they copy, and how pieces are joined."""

from __future__ import annotations

import random

import pytest

from kvxfer import Move, ReadPlan, Span, whole_blocks


def test_neighbours_on_both_sides_are_one_piece() -> None:
    plan = whole_blocks([4, 5, 6, 9, 8], [0, 1, 2, 3, 4], 10)
    assert plan.pieces() == [(40, 0, 30), (90, 30, 10), (80, 40, 10)]
    assert plan.num_bytes == 50 and plan.is_whole


def test_nothing_to_read() -> None:
    plan = whole_blocks([], [], 10)
    assert plan.pieces() == [] and plan.num_bytes == 0


def test_as_many_sources_as_destinations() -> None:
    with pytest.raises(ValueError, match="2 source blocks"):
        whole_blocks([1, 2], [1], 10)


def test_pieces_copy_what_the_moves_say() -> None:
    """Against a copy of each span of each pair, one by one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    source = rng.randbytes(16 * 24)
    for _ in range(200):
        spans = tuple(
            Span(8 * i, 8 * rng.choice([i, i + 1]) if i == 2 else 8 * i, 8) for i in range(3)
        )
        pairs = tuple(zip(rng.sample(range(16), 5), rng.sample(range(16), 5), strict=True))
        plan = ReadPlan(tuple(src for src, _ in pairs), (Move(spans, pairs),), 24, 32)
        expected, found = bytearray(16 * 32), bytearray(16 * 32)
        for src, dst in pairs:
            for span in spans:
                at, to = src * 24 + span.src, dst * 32 + span.dst
                expected[to : to + span.num_bytes] = source[at : at + span.num_bytes]
        for at, to, size in plan.pieces():
            found[to : to + size] = source[at : at + size]
        assert found == expected
        assert sum(size for _, _, size in plan.pieces()) == plan.num_bytes == 5 * 24
        assert not plan.is_whole
