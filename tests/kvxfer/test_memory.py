"""The memory of regions goes back when nobody uses it, without waiting for a garbage collector."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvxfer import (
    KVConsumer,
    KVLayout,
    KVProducer,
    MemTransport,
    Region,
    Revoked,
    ShmTransport,
    TcpTransport,
    Transport,
)

LAYOUT = KVLayout(
    model="m", dtype="uint8", itemsize=1, block_size=1, num_layers=1, num_kv_heads=1, head_dim=64
)
WAYS: list[Callable[[], Transport]] = [
    MemTransport,
    lambda: ShmTransport("h"),
    lambda: TcpTransport("s"),
]


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def mappings(region_id: str) -> int:
    """How often this process has the region mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return maps.count(f"memfd:kvxfer-{region_id}")


def test_a_closed_region_goes_with_its_last_view() -> None:
    region = Region(4, 4096)
    name, view = region.id, region.block(2)
    view[0] = 7
    region.close()
    region.close()
    del region
    assert mappings(name) == 1 and view[0] == 7  # not pulled away under whoever has it
    del view
    assert mappings(name) == 0


@pytest.mark.parametrize("make", WAYS, ids=["mem", "shm", "tcp"])
def test_nothing_of_a_closed_pair_stays_mapped(make: Callable[[], Transport]) -> None:
    source, mine = Region(4, LAYOUT.block_bytes), Region(4, LAYOUT.block_bytes)
    names = source.id, mine.id
    producer = KVProducer(source, [make()], layout=LAYOUT, producer="p", host="h", epoch=1)
    consumer = KVConsumer(mine, [make()], layout=LAYOUT)
    found = producer.pin("x", [1, 2], [5, 6])
    consumer.pull(found, [0, 3])
    consumer.close()
    producer.close()
    for region in (source, mine):
        region.close()
    del producer, consumer, source, mine, region
    deadline = time.monotonic() + 10
    while any(map(mappings, names)):  # a server's thread may still be leaving
        assert time.monotonic() < deadline, [mappings(name) for name in names]
        threading.Event().wait(0.01)


def test_a_reader_lets_go_of_what_was_revoked() -> None:
    source, mine = Region(4, LAYOUT.block_bytes), Region(4, LAYOUT.block_bytes)
    producer = KVProducer(
        source, [ShmTransport("h")], layout=LAYOUT, producer="p", host="h", epoch=1
    )
    consumer = KVConsumer(mine, [ShmTransport("h")], layout=LAYOUT)
    found = producer.pin("x", [1], [5])
    consumer.pull(found, [0])
    assert mappings(source.id) == 2  # its own and the reader's
    source.revoke()
    try:
        consumer.pull(found, [0])
    except Revoked:
        pass
    else:
        raise AssertionError("it was read")
    # Of the error nothing is left, nor of its frames.
    assert mappings(source.id) == 1
    consumer.close()
    producer.close()
