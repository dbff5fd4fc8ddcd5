"""Both ends of `kv_peer_copy.py`: the peer with its tables, and what measurements share here."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kvxfer import DeviceRegion, KVConsumer, KVDescriptor, KVLayout, KVProducer
from kvxfer.cuda.driver import driver, ordinal_of
from kvxfer.cuda.lanes import Lane
from kvxfer.cuda.memory import cuda_tensor
from kvxfer.layout import Order
from kvxfer.plan import Span
from kvxfer.transports.cuda_ipc import CudaIpcTransport

LAYERS, HEADS, HEAD_DIM, ITEM_BYTES = 32, 8, 128, 2
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * ITEM_BYTES
GIB = 1 << 30
NUM_TABLES = 8
PACE = 180e9
ORDERS: tuple[Order, ...] = ("head_major", "token_major")


def layout_of(block_size: int, order: Order) -> KVLayout:
    """The model's, in blocks of so many tokens."""
    return KVLayout(
        model="llama-3-8b",
        dtype="bfloat16",
        itemsize=ITEM_BYTES,
        block_size=block_size,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        order=order,
    )


def half_of_heads(block_size: int, order: Order) -> tuple[Span, ...]:
    """Where the first half of the heads lies in a block, and in a rank's block of its own."""
    row = HEAD_DIM * ITEM_BYTES
    if order == "head_major":
        count, size = LAYERS * 2, HEADS * block_size * row
    else:
        count, size = LAYERS * 2 * block_size, HEADS * row
    return tuple(Span(i * size, i * size // 2, size // 2) for i in range(count))


# --- the peer


def serve(device: str, pool_bytes: int, block_sizes: list[int], tokens: list[int]) -> None:
    """Pin tables in a pool of random bytes; one line of JSON tells them, then until stdin ends."""
    import torch

    pool = cuda_tensor(pool_bytes, device)
    pool.view(torch.int64).random_()
    torch.cuda.synchronize(device)
    way = CudaIpcTransport("benchmark", host="here")
    told: dict[str, list[str]] = {}
    for size in block_sizes:
        count = pool_bytes // (size * TOKEN_BYTES)
        region = DeviceRegion(pool[: count * size * TOKEN_BYTES], count, size * TOKEN_BYTES)
        for order in ORDERS:
            producer = KVProducer(
                region, [way], layout=layout_of(size, order), producer="p", host="here", epoch=1
            )
            rng = random.Random(size)
            for length in tokens:
                name = f"{size} {order} {length}"
                told[name] = []
                for turn in range(NUM_TABLES):
                    table = rng.sample(range(count), length // size)
                    found = producer.pin(f"{name} {turn}", table, range(length))
                    told[name].append(found.to_json().decode())
    print(json.dumps(told), flush=True)
    sys.stdin.read()


# --- this end


@dataclass
class Bench:
    """What all measurements share."""

    device: str
    pool: Any
    told: dict[str, list[KVDescriptor]]
    way: CudaIpcTransport
    rounds: int
    consumers: dict[tuple[int, str], KVConsumer] = field(default_factory=dict)
    limit_gb_per_s: float = 0.0
    peer_device_differs: bool = True

    @property
    def ordinal(self) -> int:
        return ordinal_of(self.device)

    def consumer(self, size: int, order: Order) -> KVConsumer:
        """One region of ours for each layout, over the same pool."""
        if (size, order) not in self.consumers:
            block_bytes = size * TOKEN_BYTES
            count = len(self.pool) // block_bytes
            region = DeviceRegion(self.pool[: count * block_bytes], count, block_bytes)
            layout = layout_of(size, order)
            self.consumers[size, order] = KVConsumer(region, [self.way], layout=layout)
        return self.consumers[size, order]

    def tables(self, size: int, length: int) -> list[list[int]]:
        """Blocks of ours, others for each turn."""
        rng = random.Random(size + 1)
        count = len(self.pool) // (size * TOKEN_BYTES)
        return [rng.sample(range(count), length // size) for _ in range(NUM_TABLES)]

    def pool_of_peer(self, size: int, order: Order = ORDERS[0]) -> int:
        """Where it lies for our device."""
        consumer = self.consumer(size, order)
        name = next(name for name in self.told if name.startswith(f"{size} {order} "))
        found = self.told[name][0]
        consumer.pull(found, self.tables(size, found.num_tokens)[0])
        opened: Any = self.way._pool(endpoint(found), self.ordinal, 1)
        return int(opened.way._address)


def endpoint(found: KVDescriptor) -> Any:
    """The address of a descriptor's only part."""
    return found.parts[0].endpoints["cuda_ipc"]


def blocks(found: KVDescriptor) -> list[int]:
    """The blocks of a descriptor's only part."""
    return list(found.parts[0].block_ids)


def on_device(bench: Bench, rounds: int, work: Callable[[Lane, int], None]) -> float:
    """Median seconds of `work(lane, turn)` on the lane's stream."""
    cuda = driver()
    lane = Lane(bench.ordinal)
    seconds = []
    with cuda.current(bench.ordinal):
        first, last = cuda.event(timed=True), cuda.event(timed=True)
        for turn in range(rounds + 3):
            cuda.record(first, lane.stream)
            work(lane, turn)
            cuda.record(last, lane.stream)
            cuda.wait(last)
            if turn >= 3:
                seconds.append(cuda.seconds(first, last))
        cuda.destroy_event(first)
        cuda.destroy_event(last)
    lane.close()
    return median(seconds)
