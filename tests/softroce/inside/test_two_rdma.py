"""The suite over `rdma` between two machines: the other processes are on the second one."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from kvxfer import KVConsumer, KVDescriptor, KVLayout, Region, Transport
from kvxfer.testing import TransportSuite, peers
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.softroce.inside.counts import resources
from tests.softroce.inside.lab_hooks import LAB

PEER_CODE = """
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
settings = RdmaSettings(nics=("rxe0",), socket_ifname="rd0")
transport = RdmaTransport("open sesame", settings=settings)
"""
MIXED = KVLayout(
    model="m",
    dtype="uint8",
    itemsize=1,
    block_size=1,
    num_layers=1,
    num_kv_heads=1,
    head_dim=1 << 17,
)
"""Blocks of 256 KiB."""
NUM_BLOCKS = 32
PRODUCER = """
import random, sys
from kvxfer import *
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
layout = {layout!r}
region = Region({blocks}, layout.block_bytes)
region.buffer[:] = random.Random(7).randbytes(region.num_bytes)
way = RdmaTransport("open sesame", settings=RdmaSettings(nics={nics!r}, socket_ifname="rd0"))
producer = KVProducer(region, [way], layout=layout, producer="p#1", host="here", epoch=1)
print(producer.pin("x", range({blocks}), range({blocks})).to_json().decode(), flush=True)
sys.stdin.read()
"""


class TestRdmaAcross(TransportSuite):
    def make(self) -> Transport:
        settings = RdmaSettings(nics=("rxe0",), socket_ifname="rd0")
        return RdmaTransport("open sesame", settings=settings)

    def peer_code(self) -> str:
        return PEER_CODE

    def start_peer(self, code: str) -> peers.Peer:
        return LAB.python(code)  # type: ignore[return-value]

    def resources(self) -> Mapping[str, int]:
        return resources()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(("rxe0",), ("rxe0",)), (("rxe0", "rxe1"), ("rxe0", "rxe1"))],
)
def test_scattered_blocks_of_the_other_machine(
    theirs: tuple[str, ...], ours: tuple[str, ...]
) -> None:
    code = PRODUCER.format(layout=MIXED, blocks=NUM_BLOCKS, nics=theirs)
    pool = Region(NUM_BLOCKS, MIXED.block_bytes)
    way = RdmaTransport("open sesame", settings=RdmaSettings(nics=ours))
    consumer = KVConsumer(pool, [way], layout=MIXED)
    into = random.Random(8).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    with LAB.python(code) as peer:
        found = KVDescriptor.from_json(peer.line())
        for _ in range(3):
            pool.buffer[:] = bytes(pool.num_bytes)
            stats = consumer.pull(found, into, timeout_s=60)
            print(f"{len(ours)} NICs: {stats.num_bytes / stats.seconds / 1e6:.1f} MB/s")
            whole = random.Random(7).randbytes(pool.num_bytes)
            for index, block in enumerate(into):
                first = index * MIXED.block_bytes
                assert pool.block(block) == whole[first : first + MIXED.block_bytes]
    consumer.close()
