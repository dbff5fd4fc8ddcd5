"""Who copies a read, in which batches and when: on a driver that is not there."""

from __future__ import annotations

import ctypes
import random

import pytest
from fake_cuda import fake_cuda

from kvxfer import Move, ReadPlan, Span, TransferTimeout, whole_blocks
from kvxfer.cuda import mover, pace
from kvxfer.cuda.lanes import Lane
from kvxfer.kernels.table import encode

BLOCK_BYTES = 2 << 20


def halves(piece_bytes: int) -> ReadPlan:
    """Half of each of 16 blocks, in pieces of that length."""
    count = BLOCK_BYTES // 2 // piece_bytes
    spans = tuple(Span(2 * i * piece_bytes, i * piece_bytes, piece_bytes) for i in range(count))
    pairs = tuple(enumerate(range(16)))
    return ReadPlan(tuple(range(16)), (Move(spans, pairs),), BLOCK_BYTES, BLOCK_BYTES // 2)


def test_short_pieces_go_by_the_kernel_and_long_ones_by_the_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = whole_blocks(range(16), range(16), BLOCK_BYTES)
    short = whole_blocks(range(16), range(16), 1 << 16)
    monkeypatch.setattr(mover, "has_kernel", lambda: True)
    for plan, by in [
        *((whole, "engines"), (short, "kernel")),
        *((halves(16384), "kernel"), (halves(1024), "kernel"), (halves(1 << 20), "engines")),
    ]:
        assert mover.chosen(plan) == by
        assert mover.chosen(plan, "engines") == "engines"
    monkeypatch.setattr(mover, "has_kernel", lambda: False)
    assert mover.chosen(halves(1024)) == mover.chosen(short) == "engines"


def test_batches_cover_all_pieces_once_and_end_at_the_border() -> None:
    for count in range(1, 40):
        for border in range(1, count + 1):
            for first in (1, 3, 50):
                found = list(mover._batches(count, first, border))
                covered = [i for begin, end in found for i in range(begin, end)]
                assert covered == list(range(count))
                assert border in [end for _, end in found]
    assert list(mover._batches(128, 4, 96)) == [(0, 4), (4, 16), (16, 52), (52, 96), (96, 128)]


@pytest.mark.parametrize("brief_blocks", [0, 1, 7, 24, 100])
def test_a_read_in_batches_copies_every_piece(
    brief_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(7)
    size, count = 64, 24
    monkeypatch.setattr(mover, "FIRST_BYTES", 2 * size)
    source = ctypes.create_string_buffer(rng.randbytes(count * size), count * size)
    into = ctypes.create_string_buffer(count * size)
    blocks = rng.sample(range(count), count), rng.sample(range(count), count)
    plan = whole_blocks(*blocks, size)
    with fake_cuda() as fake, fake.current(0):
        lane = Lane(0)
        ends = ctypes.addressof(source), ctypes.addressof(into)
        mover.start(lane, plan, *ends, split=True, brief_bytes=brief_blocks * size)
        assert fake.done["batches"] > 1
        lane.wait()
        lane.close()
        assert not fake.held["stream"] and not fake.held["event"]
    for src, dst in zip(*blocks, strict=True):
        assert into.raw[dst * size :][:size] == source.raw[src * size :][:size]


def test_spans_that_come_again_are_encoded_the_same() -> None:
    plan = halves(1024)
    first = encode(plan, 1 << 40, 1 << 41)
    other = plan._replace(moves=(Move(plan.moves[0].spans, plan.moves[0].pairs[::-1]),))
    assert encode(other, 1 << 40, 1 << 41) != first
    assert encode(plan, 1 << 40, 1 << 41) == first


def test_reads_wait_until_no_more_came_than_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 100.0, [0.0]
    monkeypatch.setattr("kvxfer.cuda.pace.time.monotonic", lambda: now)
    monkeypatch.setattr("kvxfer.cuda.pace.time.sleep", slept.append)
    found = pace.Pace()
    found.take(1 << 40, 0)  # no limit
    found.bytes_per_s = 1000
    found.take(500, 1)
    found.take(250, 1)
    assert slept == [0.0, 0.5]
    with pytest.raises(TransferTimeout):
        found.take(1, 0.5)
    now = 101.0
    found.take(250, 0)
    assert slept == [0.0, 0.5]
