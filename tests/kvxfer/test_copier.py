"""Copies by several threads: every byte once, nothing after the end, no thread left over."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator

import pytest

from kvxfer import KVUsageError, Region, ShmTransport, whole_blocks
from kvxfer.plan import Move, ReadPlan, Span
from kvxfer.testing.checks import settles
from kvxfer.testing.harness import together
from kvxfer.transports import copier as copier_module
from kvxfer.transports.copier import Copier, default_threads

UNIT = 4096


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copier_module, "_UNIT_BYTES", UNIT)
    monkeypatch.setattr(copier_module, "_SHARED_BYTES", 2 * UNIT)
    yield
    gc.collect()
    assert settles(lambda: not helpers()), helpers()


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvxfer-copy"]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [100, UNIT, 3 * UNIT + 17])
def test_every_byte_comes_once(threads: int, block_bytes: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    source, mine = Region(64, block_bytes), Region(64, block_bytes)
    source.buffer[:] = rng.randbytes(64 * block_bytes)
    copier = Copier(threads)
    for _ in range(50):
        count = rng.randint(1, 64)
        plan = whole_blocks(rng.sample(range(64), count), rng.sample(range(64), count), block_bytes)
        mine.buffer[:] = bytes(64 * block_bytes)
        expected = bytearray(64 * block_bytes)
        for src, dst, size in plan.pieces():
            expected[dst : dst + size] = source.buffer[src : src + size]
        copier.copy(source.address, plan, mine.address)
        assert mine.buffer == expected
    copier.close()
    assert not helpers()
    source.close()
    mine.close()


def test_pieces_of_unequal_lengths() -> None:
    source, mine = Region(1, 40 * UNIT), Region(1, 40 * UNIT)
    source.buffer[:] = random.randbytes(40 * UNIT)
    spans = (Span(0, 30 * UNIT, 10 * UNIT), Span(11 * UNIT, 3, 1), Span(12 * UNIT, 7, 5 * UNIT))
    plan = ReadPlan((0,), (Move(spans, ((0, 0),)),), 40 * UNIT, 40 * UNIT)
    expected = bytearray(40 * UNIT)
    for src, dst, size in spans:
        expected[dst : dst + size] = source.buffer[src : src + size]
    copier = Copier(3)
    copier.copy(source.address, plan, mine.address)
    assert mine.buffer == expected
    copier.close()
    source.close()
    mine.close()


def test_threads_share_one() -> None:
    source, mine = Region(64, UNIT), Region(64, UNIT)
    source.buffer[:] = random.randbytes(64 * UNIT)
    copier = Copier(3)

    def copy(first: int) -> None:
        for _ in range(100):
            blocks = list(range(first, first + 8))
            into = blocks[::-1]
            copier.copy(source.address, whole_blocks(blocks, into, UNIT), mine.address)
            for block, target in zip(blocks, into, strict=True):
                assert source.block(block) == mine.block(target)

    errors = together([lambda first=8 * i: copy(first) for i in range(8)])  # type: ignore[misc]
    assert not errors, errors
    copier.close()
    copier.close()
    source.close()
    mine.close()


def test_helpers_go_with_their_copier() -> None:
    source, mine = Region(8, UNIT), Region(8, UNIT)
    copier = Copier(3)
    blocks = list(range(0, 8, 2))
    for _ in range(3):  # after a close it begins anew
        copier.copy(source.address, whole_blocks(blocks, blocks, UNIT), mine.address)
        assert len(helpers()) == 2
        copier.close()
    copier.copy(source.address, whole_blocks(blocks, blocks, UNIT), mine.address)
    del copier  # not closed: the fixture looks
    source.close()
    mine.close()


def test_how_many() -> None:
    assert 1 <= default_threads() <= 4
    with pytest.raises(KVUsageError, match="0 threads"):
        ShmTransport("h", threads=0)
