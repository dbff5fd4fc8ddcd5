"""What the transports' suites stand on: two ends, their memory, other processes.

A subclass of a suite gives `make`; the rest is as for regions in host memory and may be replaced:

    make            a transport
    make_region     memory of the producer;  make_destination: of the reader
    read_block, write_block    bytes of either, for comparing
    peer_code       Python that binds `transport` in another process, and `make_region` where that
                    is not `kvxfer.Region`; None: the transport stays within one process
    start_peer      how another process is started, on another machine perhaps
    resources       counts of what else must not leak: queue pairs, memory regions, handles
"""

from __future__ import annotations

import os
import threading
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvxfer import KVConsumer, KVDescriptor, KVLayout, KVProducer, Region, Transport
from kvxfer.testing import checks, memory, peers


def _layout(dtype: str, size: int, layers: int, heads: int, dim: int) -> KVLayout:
    return KVLayout(
        model="m",
        dtype=dtype,
        itemsize={"float32": 4, "float16": 2}[dtype],
        block_size=size,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
    )


LAYOUTS = [_layout("float32", *shape) for shape in [(16, 2, 2, 8), (1, 1, 1, 1), (32, 3, 5, 7)]]
LARGE = _layout("float16", 16, 32, 16, 256)
"""Blocks of 8 MiB."""
NUM_BLOCKS = 64


@dataclass
class Pair:
    """Two ends in one process, and their memory."""

    source: Region
    destination: Region
    producer: KVProducer
    consumer: KVConsumer
    transport: Transport
    """The consumer's."""
    layout: KVLayout
    read: Callable[[Region, int], bytes]

    def offer(self, blocks: list[int], name: str = "x") -> KVDescriptor:
        """Pin full blocks; the descriptor travels as JSON, as it would between machines."""
        tokens = list(range(len(blocks) * self.layout.block_size))
        described = self.producer.pin(name, blocks, tokens, b"pay\x00load")
        return KVDescriptor.from_json(described.to_json())

    def assert_equal(self, blocks: list[int], into: list[int]) -> None:
        """Each block is byte for byte the other."""
        for src, dst in zip(blocks, into, strict=True):
            assert self.read(self.source, src) == self.read(self.destination, dst), (src, dst)


class TransportHarness:
    """See the module."""

    def make(self) -> Transport:
        """A fresh transport, good for either end."""
        raise NotImplementedError

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        """Memory that `make`'s transports serve."""
        return Region(num_blocks, block_bytes)

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        """Memory that `make`'s transports read into."""
        return self.make_region(num_blocks, block_bytes)

    def read_block(self, region: Region, block_id: int) -> bytes:
        """What lies in a block."""
        return memory.read_block(region, block_id)

    def write_block(self, region: Region, block_id: int, data: bytes) -> None:
        """Put `data`, a whole block, there; done when it returns."""
        memory.write_block(region, block_id, data)

    def peer_code(self) -> str | None:
        """See the module."""
        return None

    def start_peer(self, code: str) -> peers.Peer:
        """Another process that runs `code`."""
        return peers.Peer(code)

    def resources(self) -> Mapping[str, int]:
        """Counts of what this process holds besides files, threads and mappings."""
        return {}

    # --- what the tests use

    @contextmanager
    def pair(self, layout: KVLayout = LAYOUTS[0]) -> Iterator[Pair]:
        """Both ends, closed afterwards; the source's blocks are random."""
        source = self.make_region(NUM_BLOCKS, layout.block_bytes)
        destination = self.make_destination(NUM_BLOCKS, layout.block_bytes)
        for block in range(NUM_BLOCKS):
            self.write_block(source, block, os.urandom(layout.block_bytes))
        producer = KVProducer(
            source, [self.make()], layout=layout, producer="p#1", host="here", epoch=7
        )
        way = self.make()
        consumer = KVConsumer(destination, [way], layout=layout)
        try:
            yield Pair(source, destination, producer, consumer, way, layout, self.read_block)
        finally:
            consumer.close()
            producer.close()
            source.close()
            destination.close()

    @contextmanager
    def reader(self, layout: KVLayout = LAYOUTS[0], blocks: int = 8) -> Iterator[KVConsumer]:
        """A consumer with a pool of its own."""
        region = self.make_destination(blocks, layout.block_bytes)
        consumer = KVConsumer(region, [self.make()], layout=layout)
        try:
            yield consumer
        finally:
            consumer.close()
            region.close()

    @contextmanager
    def producing(self, layout: KVLayout = LAYOUTS[0]) -> Iterator[tuple[peers.Peer, KVDescriptor]]:
        """A process that has `peers.TABLE` pinned, blocks full of ones. Skips without one."""
        with self.start_peer(peers.producer_code(self._peer_code(), layout)) as peer:
            yield peer, KVDescriptor.from_json(peer.line())

    @contextmanager
    def reading(self, layout: KVLayout, descriptor: KVDescriptor) -> Iterator[peers.Peer]:
        """A process that pulls the descriptor's two blocks again and again."""
        with self.start_peer(peers.reader_code(self._peer_code(), layout)) as peer:
            peer.say(descriptor.to_json().decode())
            assert peer.line() == "reading"
            yield peer

    def _peer_code(self) -> str:
        code = self.peer_code()
        if code is None:
            raise unittest.SkipTest("this transport stays within one process")
        return code

    def holdings(self) -> checks.Holdings:
        """What this process has open now."""
        return checks.holdings(self.resources())

    def assert_settles(self, before: checks.Holdings) -> None:
        """In a few seconds no more is open than `before`."""
        found = checks.settles(lambda: self.holdings() <= before)
        assert found, (before, self.holdings())


def together(work: Sequence[Callable[[], object]], timeout_s: float = 60.0) -> list[BaseException]:
    """Run each on a thread of its own; what they raised."""
    errors: list[BaseException] = []

    def run(one: Callable[[], object]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads), "a reader does not come back"
    return errors


def at(descriptor: KVDescriptor, endpoints: Mapping[str, Mapping[str, Any]]) -> KVDescriptor:
    """The same of one rank, said to be elsewhere."""
    (part,) = descriptor.parts
    return replace(descriptor, parts=(replace(part, endpoints=endpoints),))


def of_blocks(descriptor: KVDescriptor, block_ids: Sequence[int]) -> KVDescriptor:
    """The same of one rank, said to be in other blocks."""
    (part,) = descriptor.parts
    return replace(descriptor, parts=(replace(part, block_ids=tuple(block_ids)),))
