"""What every transport must do, as tests."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from kvxfer import (
    BadDescriptor,
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    KVTransferError,
    KVUsageError,
    LayoutMismatch,
    PoolExhausted,
    Region,
    Revoked,
    StaleEpoch,
    StaleGeneration,
    TokenMismatch,
    TransferTimeout,
    Transport,
    TransportError,
)
from kvxfer.testing import peers
from kvxfer.testing.checks import holdings, raises, settles

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
LARGE = KVLayout(
    model="m",
    dtype="float16",
    itemsize=2,
    block_size=16,
    num_layers=32,
    num_kv_heads=16,
    head_dim=256,
)
"""Blocks of 8 MiB."""
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
            raises(StaleGeneration, lambda: pair.consumer.pull(described, [0, 1, 2]))
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
            raises(StaleEpoch, lambda: pair.consumer.pull(described, [0]))

    def test_a_revoked_region_cannot_be_read(self) -> None:
        """Neither by a peer that never read it nor by one that did."""
        with self.pair() as pair:
            described = pair.offer([1])
            pair.consumer.pull(described, [0])
            pair.source.revoke()
            raises(Revoked, lambda: pair.consumer.pull(described, [0]))

    def test_a_wrong_layout_is_refused_before_the_read(self) -> None:
        """Nothing is moved between pools of different shapes."""
        with self.pair(LAYOUTS[0]) as pair, self.pair(LAYOUTS[2]) as other:
            described = pair.offer([1])
            before = bytes(other.destination.block(0))
            raises(LayoutMismatch, lambda: other.consumer.pull(described, [0]))
            assert other.destination.block(0) == before

    def test_too_few_destination_blocks_are_refused(self) -> None:
        """The pool at the reader's end is exhausted."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            raises(PoolExhausted, lambda: pair.consumer.pull(described, [0, 1]))

    def test_other_tokens_are_noticed(self) -> None:
        """The hash in the descriptor is that of the tokens."""
        with self.pair() as pair:
            described = pair.offer([1])
            described.prove_tokens(range(pair.layout.block_size))
            raises(TokenMismatch, lambda: described.prove_tokens([1, 2, 3]))

    # --- descriptors of others

    def test_blocks_that_are_not_there_are_refused(self) -> None:
        """Neither end touches memory outside of its region."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            for blocks in ([1, NUM_BLOCKS], [1, 2**31]):
                raises(
                    BadDescriptor,
                    partial(
                        pair.consumer.pull, replace(described, block_ids=tuple(blocks)), [0, 1]
                    ),
                )
            for into in ([0, NUM_BLOCKS], [-1, 0]):
                raises(KVUsageError, partial(pair.consumer.pull, described, into))
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([1, 2], [0, 1])

    def test_an_address_of_nonsense_is_an_error_of_ours(self) -> None:
        """Every field missing, null, negative, huge or of another type, one at a time."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            nonsense: list[object] = [None, -1, 2**70, "nobody", [], {}]
            for name, address in described.endpoints.items():
                for field in address:
                    for value in nonsense:
                        endpoints = {name: {**address, field: value}}
                        wrong = replace(described, endpoints=endpoints)
                        raises(KVTransferError, partial(self._pull, pair, wrong))
                    rest = {key: found for key, found in address.items() if key != field}
                    wrong = replace(described, endpoints={name: rest})
                    raises(KVTransferError, partial(self._pull, pair, wrong))
            pair.consumer.pull(described, [0, 1])

    @staticmethod
    def _pull(pair: Pair, descriptor: KVDescriptor) -> None:
        pair.consumer.pull(descriptor, [0, 1], timeout_s=0.5)

    # --- peers that end

    def test_a_dead_producer_is_an_error_within_the_time(self) -> None:
        """Killed before the first read, or between two."""
        code = self.peer_code()
        if code is None:
            return
        for reads_before in (0, 1):
            with peers.producing(code, LAYOUTS[0]) as (process, found), self.reader() as reader:
                for _ in range(reads_before):
                    reader.pull(found, [0, 1], timeout_s=10)
                    assert reader.region.block(0) == b"\x01" * LAYOUTS[0].block_bytes
                peers.kill(process)
                start = time.monotonic()
                raises(TransportError, partial(reader.pull, found, [0, 1], timeout_s=5))
                assert time.monotonic() - start < 6

    def test_a_producer_that_dies_in_mid_read_is_an_error_within_the_time(self) -> None:
        """Four readers pull blocks of 8 MiB without a pause when it is killed."""
        code = self.peer_code()
        if code is None:
            return
        with peers.producing(code, LARGE) as (process, found), self.reader(LARGE) as reader:
            reading, lock = threading.Barrier(5), threading.Lock()
            errors: list[BaseException] = []
            ones = b"\x01" * LARGE.block_bytes

            def pull(first: int) -> None:
                reader.pull(found, [first, first + 1], timeout_s=20)
                reading.wait()
                try:
                    while True:
                        reader.pull(found, [first, first + 1], timeout_s=20)
                except BaseException as error:
                    with lock:
                        errors.append(error)
                    if not isinstance(error, TransportError):
                        raise

            threads = [threading.Thread(target=pull, args=(2 * i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            reading.wait()
            start = time.monotonic()
            peers.kill(process)
            for thread in threads:
                thread.join(30)
            assert time.monotonic() - start < 20
            assert len(errors) == 4 and all(isinstance(e, TransportError) for e in errors), errors
            assert reader.region.block(0) == ones  # what was proved before is still there

    def test_a_stopped_producer_costs_at_most_the_timeout(self) -> None:
        """Read all the same, or an error in time; and read again once it runs on."""
        code = self.peer_code()
        if code is None:
            return
        with peers.producing(code, LAYOUTS[0]) as (process, found), self.reader() as reader:
            reader.pull(found, [0, 1], timeout_s=10)
            peers.stop(process)
            start = time.monotonic()
            with contextlib.suppress(TransferTimeout):
                reader.pull(found, [0, 1], timeout_s=0.5)
            assert time.monotonic() - start < 2
            process.send_signal(signal.SIGCONT)
            reader.pull(found, [0, 1], timeout_s=10)

    def test_a_dead_reader_leaves_the_producer_well(self) -> None:
        """A reader that vanishes in the middle of its reads costs nobody else anything."""
        code = self.peer_code()
        if code is None:
            return
        with self.pair() as pair:
            described = pair.offer([3, 1])
            pair.consumer.pull(described, [0, 1])
            before = holdings()
            for _ in range(3):
                with peers.reading(code, LAYOUTS[0], described) as reader:
                    peers.kill(reader)
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([3, 1], [0, 1])
            assert settles(lambda: holdings() <= before), (before, holdings())

    # --- leaks

    def test_short_transfers_leak_nothing(self) -> None:
        """Thousands of reads and many peers; then files, threads and mappings are as before."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            pair.consumer.pull(described, [0, 1])
            before = holdings()
            for turn in range(5000):
                pair.consumer.pull(described, [turn % 32, 32 + turn % 32])
            assert settles(lambda: holdings() <= before), (before, holdings())
        before = holdings()
        for _ in range(20):
            with self.pair() as pair:
                pair.consumer.pull(pair.offer([1]), [0])
        assert settles(lambda: holdings() <= before), (before, holdings())

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
