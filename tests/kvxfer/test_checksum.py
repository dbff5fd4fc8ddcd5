"""Checksums: the same everywhere, whatever the ends look like, and no damage that passes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCudaRegion, fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import (
    BadDescriptor,
    ChecksumMismatch,
    DeviceRegion,
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    KVUsageError,
    MemTransport,
    Region,
    ShmTransport,
    Transport,
    checksum,
    merge_parts,
)
from kvxfer.layout import Order
from kvxfer.testing.unequal import HOST, ORDERS, UnequalSuite, ranks_of, unequal_layout
from kvxfer.transports import Fault, cuda_ipc

torch.set_num_threads(1)
NUM_BLOCKS = 24


class Mover(UnequalSuite):
    """Moves with checksums; rows are compared too, so a sum that is wrong for right bytes shows."""

    checksum = True

    def __init__(self, make: Callable[[], Transport]) -> None:
        self._make = make

    def make(self) -> Transport:
        return self._make()


MEM, SHM = Mover(MemTransport), Mover(lambda: ShmTransport(HOST))


@pytest.mark.parametrize("mover", [MEM, SHM], ids=["mem", "shm"])
@pytest.mark.parametrize("order", ORDERS)
@given(
    tp_sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 2),
    block_sizes=st.tuples(*[st.sampled_from([1, 8, 16, 24, 32])] * 2),
    heads=st.sampled_from([1, 2, 4, 8]),
    row_bytes=st.sampled_from([2, 4, 6, 16]),
    tokens=st.integers(1, 100),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None, print_blob=True)
def test_what_arrived_whole_is_accepted(
    mover: Mover,
    order: Order,
    tp_sizes: tuple[int, int],
    block_sizes: tuple[int, int],
    heads: int,
    row_bytes: int,
    tokens: int,
    seed: int,
) -> None:
    layout = unequal_layout(order, 1, heads=heads, row_bytes=row_bytes)
    tokens = min(tokens, 40 * min(block_sizes))
    mover.move(random.Random(seed), layout, tp_sizes, block_sizes, tokens)


def filled(layout: KVLayout, seed: int = 3) -> Region:
    region = Region(NUM_BLOCKS, layout.block_bytes)
    region.buffer[:] = random.Random(seed).randbytes(region.num_bytes)
    return region


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("row_bytes", [24, 10, 7])
def test_the_sums_are_what_the_formula_says(order: Order, row_bytes: int) -> None:
    """Word by word, in Python's own numbers."""
    layout = replace(
        unequal_layout(order, 4, 2, 1, layers=1), itemsize=1, head_dim=row_bytes, dtype="uint8"
    )
    region, word = filled(layout), 4 if row_bytes % 4 == 0 else 2 if row_bytes % 2 == 0 else 1
    a, c = (
        table.tolist()
        for table in checksum._weights(layout.num_planes, 4, row_bytes // word, "cpu")
    )
    expected = []
    for block, tokens in ((5, 4), (2, 4), (9, 3)):
        for head in layout.heads:
            total = 0
            for plane in range(layout.num_planes):
                for token in range(tokens):
                    at = layout.offset(plane, head, token)
                    row = bytes(region.block(block)[at : at + row_bytes])
                    for i in range(row_bytes // word):
                        number = int.from_bytes(
                            row[i * word : (i + 1) * word], sys.byteorder, signed=word > 1
                        )
                        total += number * a[plane][token][i] + (number >> 16) * c[plane][token][i]
            expected.append(total % 2**32)
    assert list(checksum.block_sums(region, layout, [5, 2, 9], 11)) == expected
    region.close()


@pytest.mark.parametrize("tile_bytes", [1, 300, 5000, 1 << 30])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, tile_bytes: int) -> None:
    for order in ORDERS:
        layout = unequal_layout(order, 16)
        region, blocks = filled(layout), [3, 9, 1, 0, 23, 7]
        expected = checksum.block_sums(region, layout, blocks, 90)
        assert len(expected) == 6 * 4 and len(set(expected)) == 24
        with monkeypatch.context() as patch:
            patch.setitem(checksum._TILE_BYTES, "cpu", tile_bytes)
            assert checksum.block_sums(region, layout, blocks, 90) == expected
        region.close()


def test_memory_of_a_tensor_gives_the_same() -> None:
    layout = unequal_layout("head_major", 16)
    host = filled(layout)
    tensor = torch.frombuffer(bytearray(host.buffer), dtype=torch.float16)
    region = DeviceRegion(tensor, NUM_BLOCKS, layout.block_bytes)
    expected = checksum.block_sums(host, layout, [4, 3], 20)
    assert checksum.block_sums(region, layout, [4, 3], 20) == expected
    host.close()
    region.close()


def test_pools_on_devices_between_ends_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `cuda_ipc`, whose devices are this process's memory here."""
    monkeypatch.setattr(cuda_ipc, "_served", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    mover = Mover(lambda: cuda_ipc.CudaIpcTransport("open sesame", host=HOST))
    monkeypatch.setattr(mover, "make_region", FakeCudaRegion, raising=False)
    monkeypatch.setattr(mover, "make_destination", FakeCudaRegion, raising=False)
    with fake_cuda():
        mover.test_other_ranks_and_block_sizes()


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for order in ORDERS:
        for row_bytes, block_size in ((256, 16), (24, 32), (6, 8)):
            layout = unequal_layout(order, block_size, row_bytes=row_bytes, layers=3)
            host = filled(layout)
            tensor = torch.frombuffer(host.buffer, dtype=torch.uint8).to("cuda:0")
            region = DeviceRegion(tensor, NUM_BLOCKS, layout.block_bytes)
            blocks, tokens = list(range(NUM_BLOCKS)), NUM_BLOCKS * block_size - 5
            expected = checksum.block_sums(host, layout, blocks, tokens)
            assert checksum.block_sums(region, layout, blocks, tokens) == expected
            host.close()
            region.close()


@contextmanager
def ends(
    theirs: list[KVLayout], ours: KVLayout, tokens: int, skip: int = 0
) -> Iterator[tuple[KVDescriptor, KVConsumer, list[int], MemTransport]]:
    """A described prompt, who reads it, into which blocks."""
    producers = [
        KVProducer(
            filled(layout), [MemTransport()], layout=layout, producer="p", host="h", checksum=True
        )
        for layout in theirs
    ]
    table = list(range(2, 2 - (-tokens // theirs[0].block_size)))
    found = merge_parts([producer.pin("x", table, range(tokens)) for producer in producers])
    way, region = MemTransport(), Region(NUM_BLOCKS, ours.block_bytes)
    consumer = KVConsumer(region, [way], layout=ours)
    into = list(range(1, 1 - (-tokens // ours.block_size) - skip))
    try:
        yield KVDescriptor.from_json(found.to_json()), consumer, into, way
    finally:
        consumer.close()
        region.close()
        for producer in producers:
            producer.close()
            producer.region.close()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("ranks", "sizes"), [((1, 1), (16, 16)), ((2, 1), (16, 8)), ((1, 2), (8, 32))]
)
def test_bytes_that_were_changed_on_their_way(
    order: Order, ranks: tuple[int, int], sizes: tuple[int, int]
) -> None:
    layout = unequal_layout(order, 8)
    theirs = ranks_of(layout, ranks[0], sizes[0])
    (ours, *_) = ranks_of(layout, ranks[1], sizes[1])
    with ends(theirs, ours, 50) as (found, consumer, into, way):
        consumer.pull(found, into)
        way.faults.append(Fault("corrupt"))
        with pytest.raises(ChecksumMismatch, match="1 of"):
            consumer.pull(found, into)
        consumer.pull(found, into)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [16, 8, 32])
def test_no_damage_passes(order: Order, size: int) -> None:
    """A bit anywhere, two rows exchanged, two blocks exchanged, every sign turned."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    layout = unequal_layout(order, 16)
    ours = layout.of(block_size=size, tp_size=1, tp_rank=0)
    with ends([layout], ours, 64) as (found, consumer, into, _):
        consumer.pull(found, into)
        region, good = consumer.region, bytes(consumer.region.buffer)
        begin, end = into[0] * ours.block_bytes, (into[-1] + 1) * ours.block_bytes

        def assert_noticed() -> None:
            with pytest.raises(ChecksumMismatch):
                checksum.verify(found, region, ours, into)
            region.buffer[:] = good

        for _ in range(40):
            region.buffer[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
            assert_noticed()
        row = ours.row_bytes
        for _ in range(40):
            one, other = (rng.randrange(begin, end) // row * row for _ in range(2))
            if good[one : one + row] != good[other : other + row]:
                region.buffer[one : one + row] = good[other : other + row]
                region.buffer[other : other + row] = good[one : one + row]
                assert_noticed()
        one, other = rng.sample(into, 2)
        first, second = bytes(region.block(one)), bytes(region.block(other))
        region.block(one)[:], region.block(other)[:] = second, first
        assert_noticed()
        for at in range(begin + 1, end, 2):
            region.buffer[at] ^= 0x80
        assert_noticed()
        checksum.verify(found, region, ours, into)


def test_what_was_read_in_part_is_not_covered_and_all_else_is() -> None:
    theirs, ours = unequal_layout("head_major", 16), unequal_layout("head_major", 8)
    with ends([theirs], ours, 60, skip=1) as (found, consumer, into, _):
        consumer.pull(found, into, skip_blocks=1)
        consumer.region.block(into[0])[3] ^= 1
        checksum.verify(found, consumer.region, ours, into, 1)
        for block in into[1:]:
            consumer.region.block(block)[3] ^= 1
            with pytest.raises(ChecksumMismatch):
                checksum.verify(found, consumer.region, ours, into, 1)
            consumer.region.block(block)[3] ^= 1
        past_the_end = ours.offset(2, 3, 5)  # the last block holds four tokens
        consumer.region.block(into[-1])[past_the_end] ^= 1
        checksum.verify(found, consumer.region, ours, into, 1)


def test_sums_of_the_wrong_number_are_refused_before_anything_moves() -> None:
    layout = unequal_layout("head_major", 16)
    with ends([layout], layout, 60) as (found, consumer, into, _):
        (part,) = found.parts
        for sums in (part.checksums[1:], (*part.checksums, 1)):
            wrong = replace(found, parts=(replace(part, checksums=sums),))
            with pytest.raises(BadDescriptor):
                consumer.pull(wrong, into)
        assert not any(consumer.region.buffer)
        bare = replace(found, parts=(replace(part, checksums=()),))
        consumer.pull(bare, into)


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "find_spec", lambda name: None)
    layout = unequal_layout("head_major", 16)
    region = Region(2, layout.block_bytes)
    with pytest.raises(KVUsageError, match="torch"):
        KVProducer(region, [], layout=layout, producer="p", host="h", checksum=True)
    KVProducer(region, [], layout=layout, producer="p", host="h")
    region.close()


def test_torch_stays_out_unless_sums_are_asked_for() -> None:
    code = """
import sys
from kvxfer import *
layout = KVLayout(model="m", dtype="uint8", itemsize=1, block_size=2, num_layers=1,
                  num_kv_heads=2, head_dim=4)
regions = [Region(4, layout.block_bytes) for _ in range(2)]
producer = KVProducer(regions[0], [MemTransport()], layout=layout, producer="p", host="h")
KVConsumer(regions[1], [MemTransport()], layout=layout).pull(
    producer.pin("x", [1, 3], range(4)), [0, 1])
assert "torch" not in sys.modules
summing = KVProducer(regions[0], [MemTransport()], layout=layout, producer="p", host="h",
                     checksum=True)
assert "torch" not in sys.modules
summing.pin("x", [1, 3], range(4))
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
