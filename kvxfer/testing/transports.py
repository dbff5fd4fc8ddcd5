"""What every transport must do, as tests."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO

from kvxfer import (
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    LayoutMismatch,
    PoolExhausted,
    Region,
    Revoked,
    StaleEpoch,
    StaleGeneration,
    TokenMismatch,
    Transport,
    TransportError,
)

LAYOUTS = [
    KVLayout(
        model="m",
        dtype="float32",
        itemsize=4,
        block_size=size,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
    )
    for size, layers, heads, dim in [(16, 2, 2, 8), (1, 1, 1, 1), (32, 3, 5, 7)]
]
NUM_BLOCKS = 64


@dataclass
class Pair:
    """Two ends in one process, and their memory."""

    source: Region
    destination: Region
    producer: KVProducer
    consumer: KVConsumer
    layout: KVLayout

    def offer(self, blocks: list[int], name: str = "x") -> KVDescriptor:
        """Pin full blocks; the descriptor travels as JSON, as it would between machines."""
        tokens = list(range(len(blocks) * self.layout.block_size))
        described = self.producer.pin(name, blocks, tokens, b"pay\x00load")
        return KVDescriptor.from_json(described.to_json())

    def assert_equal(self, blocks: list[int], into: list[int]) -> None:
        """Each block is byte for byte the other."""
        for src, dst in zip(blocks, into, strict=True):
            assert self.source.block(src) == self.destination.block(dst), (src, dst)


class TransportSuite:
    """Subclass it; give `make`, and where another process can serve, `peer_code`."""

    def make(self) -> Transport:
        """A fresh transport, good for either end."""
        raise NotImplementedError

    def peer_code(self) -> str | None:
        """Python that binds `transport` in another process; None: this one stays in its own."""
        return None

    # --- helpers

    @contextmanager
    def pair(self, layout: KVLayout = LAYOUTS[0]) -> Iterator[Pair]:
        """Both ends, closed afterwards."""
        source = Region(NUM_BLOCKS, layout.block_bytes)
        destination = Region(NUM_BLOCKS, layout.block_bytes)
        source.buffer[:] = os.urandom(len(source.buffer))
        producer = KVProducer(
            source, [self.make()], layout=layout, producer="p#1", host="here", epoch=7
        )
        consumer = KVConsumer(destination, [self.make()], layout=layout)
        try:
            yield Pair(source, destination, producer, consumer, layout)
        finally:
            consumer.close()
            producer.close()
            source.close()
            destination.close()

    @contextmanager
    def peer(self, code: str, layout: KVLayout) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Another process with a served region of ones; yields it and its descriptor."""
        text = _PEER.format(code=code, block_bytes=layout.block_bytes, layout=repr(layout))
        process = subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield process, _line(process.stdout)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    # --- equal bytes

    def test_equal_bytes_for_random_tables_and_layouts(self) -> None:
        """Any blocks into any others, in any order."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        for layout in LAYOUTS:
            with self.pair(layout) as pair:
                for turn in range(20):
                    count = rng.randint(1, NUM_BLOCKS)
                    blocks = rng.sample(range(NUM_BLOCKS), count)
                    into = rng.sample(range(NUM_BLOCKS), count)
                    pair.destination.buffer[:] = bytes(len(pair.destination.buffer))
                    skip = rng.randrange(count)
                    described = pair.offer(blocks, str(turn))
                    stats = pair.consumer.pull(described, into[skip:], skip_blocks=skip)
                    pair.assert_equal(blocks[skip:], into[skip:])
                    assert stats.num_bytes == (count - skip) * layout.block_bytes
                    untouched = set(range(NUM_BLOCKS)) - set(into[skip:])
                    assert all(not any(pair.destination.block(b)) for b in untouched)
                    assert pair.producer.unpin(str(turn)) == tuple(blocks)

    def test_concurrent_readers_get_their_own_blocks(self) -> None:
        """Eight threads, one consumer, different destinations."""
        with self.pair() as pair:
            described = [pair.offer([i, 63 - i], str(i)) for i in range(8)]
            errors: list[BaseException] = []

            def pull(i: int) -> None:
                try:
                    for _ in range(25):
                        pair.consumer.pull(described[i], [2 * i, 2 * i + 1])
                        pair.assert_equal([i, 63 - i], [2 * i, 2 * i + 1])
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=pull, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors

    # --- proofs

    def test_a_reused_block_is_noticed(self) -> None:
        """Given to other content after the descriptor was made, before or during the read."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            pair.source.bump([2])
            _raises(StaleGeneration, lambda: pair.consumer.pull(described, [0, 1, 2]))
            fresh = pair.offer([1, 2, 3], "y")
            pair.consumer.pull(fresh, [0, 1, 2])

    def test_no_read_that_overlaps_a_reuse_passes(self) -> None:
        """A writer reuses blocks all the time; whatever is proved holds one content alone."""
        layout = LAYOUTS[2]
        with self.pair(layout) as pair:
            stop = threading.Event()
            blocks = list(range(16))
            lock = threading.Lock()

            def write() -> None:
                value = 0
                while not stop.is_set():
                    value = (value + 1) % 250
                    with lock:
                        pair.source.bump(blocks)
                        for block in blocks:
                            pair.source.block(block)[:] = bytes([value]) * layout.block_bytes

            thread = threading.Thread(target=write)
            thread.start()
            proved = 0
            try:
                for turn in range(300):
                    with lock:  # descriptors are made by the owner, between its writes
                        described = pair.offer(blocks, str(turn))
                        value = pair.source.buffer[0]
                    try:
                        pair.consumer.pull(described, blocks)
                    except StaleGeneration:
                        continue
                    finally:
                        pair.producer.unpin(str(turn))
                    proved += 1
                    for block in blocks:
                        assert pair.destination.block(block) == bytes([value]) * layout.block_bytes
            finally:
                stop.set()
                thread.join()
            print(f"{proved} of 300 reads were proved")
            described = pair.offer(blocks, "last")
            pair.consumer.pull(described, blocks)
            pair.assert_equal(blocks, blocks)

    def test_another_life_of_the_producer_is_noticed(self) -> None:
        """Every descriptor of an earlier epoch is stale."""
        with self.pair() as pair:
            described = pair.offer([1])
            pair.producer.reset(8)
            _raises(StaleEpoch, lambda: pair.consumer.pull(described, [0]))

    def test_a_revoked_region_cannot_be_read(self) -> None:
        """Neither by a peer that never read it nor by one that did."""
        with self.pair() as pair:
            described = pair.offer([1])
            pair.consumer.pull(described, [0])
            pair.source.revoke()
            _raises(Revoked, lambda: pair.consumer.pull(described, [0]))

    def test_a_wrong_layout_is_refused_before_the_read(self) -> None:
        """Nothing is moved between pools of different shapes."""
        with self.pair(LAYOUTS[0]) as pair, self.pair(LAYOUTS[2]) as other:
            described = pair.offer([1])
            before = bytes(other.destination.block(0))
            _raises(LayoutMismatch, lambda: other.consumer.pull(described, [0]))
            assert other.destination.block(0) == before

    def test_too_few_destination_blocks_are_refused(self) -> None:
        """The pool at the reader's end is exhausted."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            _raises(PoolExhausted, lambda: pair.consumer.pull(described, [0, 1]))

    def test_other_tokens_are_noticed(self) -> None:
        """The hash in the descriptor is that of the tokens."""
        with self.pair() as pair:
            described = pair.offer([1])
            described.prove_tokens(range(pair.layout.block_size))
            _raises(TokenMismatch, lambda: described.prove_tokens([1, 2, 3]))

    # --- peers that end

    def test_a_dead_producer_is_an_error_within_the_time(self) -> None:
        """Killed before the first read, or between two."""
        code = self.peer_code()
        if code is None:
            return
        for reads_before in (0, 1):
            with self.peer(code, LAYOUTS[0]) as (process, described), self.reader() as reader:
                descriptor = KVDescriptor.from_json(described)
                for _ in range(reads_before):
                    reader.pull(descriptor, [0, 1], timeout_s=10)
                    assert reader.region.block(0) == b"\x01" * LAYOUTS[0].block_bytes
                process.kill()
                process.wait()
                start = time.monotonic()
                _raises(TransportError, partial(reader.pull, descriptor, [0, 1], timeout_s=5))
                assert time.monotonic() - start < 6

    def test_a_dead_reader_leaves_the_producer_well(self) -> None:
        """A reader that vanishes in the middle of its reads costs nobody else anything."""
        code = self.peer_code()
        if code is None:
            return
        with self.pair() as pair:
            described = pair.offer([3, 1])
            text = _READER.format(code=code, layout=repr(LAYOUTS[0]))
            reader = subprocess.Popen(
                [sys.executable, "-c", text],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert reader.stdin is not None and reader.stdout is not None
            reader.stdin.write(described.to_json().decode() + "\n")
            reader.stdin.flush()
            assert _line(reader.stdout) == "reading"
            reader.kill()
            reader.wait()
            reader.stdin.close()
            reader.stdout.close()
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([3, 1], [0, 1])

    # --- leaks

    def test_short_transfers_leak_nothing(self) -> None:
        """Thousands of reads and many peers; then files, threads and mappings are as before."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            pair.consumer.pull(described, [0, 1])
            before = _holdings()
            for turn in range(5000):
                pair.consumer.pull(described, [turn % 32, 32 + turn % 32])
            assert _settles(lambda: _holdings() <= before), (before, _holdings())
        before = _holdings()
        for _ in range(20):
            with self.pair() as pair:
                pair.consumer.pull(pair.offer([1]), [0])
        assert _settles(lambda: _holdings() <= before), (before, _holdings())

    @contextmanager
    def reader(self, layout: KVLayout = LAYOUTS[0]) -> Iterator[KVConsumer]:
        """A consumer with a pool of its own."""
        region = Region(NUM_BLOCKS, layout.block_bytes)
        consumer = KVConsumer(region, [self.make()], layout=layout)
        try:
            yield consumer
        finally:
            consumer.close()
            region.close()


@dataclass(frozen=True)
class _Holdings:
    files: int
    threads: int
    mappings: int

    def __le__(self, other: _Holdings) -> bool:
        return (
            self.files <= other.files
            and self.threads <= other.threads
            and self.mappings <= other.mappings
        )


def _holdings() -> _Holdings:
    """Open files, threads and mapped regions of this process."""
    gc.collect()
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        mappings = sum("memfd:kvxfer" in line for line in file)
    return _Holdings(len(os.listdir("/proc/self/fd")), threading.active_count(), mappings)  # noqa: PTH208


def _settles(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _raises(kind: type[Exception], work: Callable[[], object]) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def _line(pipe: IO[str]) -> str:
    line = pipe.readline().strip()
    assert line, "the other process said nothing"
    return line


_PEER = """
import sys
from kvxfer import *
{code}
region = Region(8, {block_bytes})
region.buffer[:] = bytes([1]) * len(region.buffer)
producer = KVProducer(region, [transport], layout={layout}, producer="p#1", host="here", epoch=1)
print(producer.pin("x", [1, 2], list(range(20))).to_json().decode(), flush=True)
sys.stdin.read()
"""

_READER = """
import sys
from kvxfer import *
{code}
layout = {layout}
consumer = KVConsumer(Region(8, layout.block_bytes), [transport], layout=layout)
descriptor = KVDescriptor.from_json(sys.stdin.readline())
consumer.pull(descriptor, [0, 1])
print("reading", flush=True)
while True:
    consumer.pull(descriptor, [0, 1])
"""
