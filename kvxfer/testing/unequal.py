"""Ends with other ranks and other block sizes get the rows that they need, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvxfer import (
    BadDescriptor,
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    LayoutMismatch,
    PoolExhausted,
    Region,
    merge_parts,
)
from kvxfer.layout import Order
from kvxfer.testing import rows
from kvxfer.testing.checks import raises
from kvxfer.testing.harness import TransportHarness

NUM_BLOCKS = 48
ORDERS: tuple[Order, ...] = ("head_major", "token_major")
HOST = "here"


def unequal_layout(
    order: Order,
    block_size: int,
    tp_size: int = 1,
    tp_rank: int = 0,
    *,
    heads: int = 4,
    row_bytes: int = 24,
    layers: int = 2,
) -> KVLayout:
    """A small one."""
    return KVLayout(
        model="m",
        dtype="float16",
        itemsize=2,
        block_size=block_size,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=row_bytes // 2,
        order=order,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )


def ranks_of(layout: KVLayout, tp_size: int, block_size: int) -> list[KVLayout]:
    """The layouts of all ranks of an end."""
    return [
        layout.of(block_size=block_size, tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)
    ]


@dataclass
class Ranks:
    """A producer of several ranks with the KV of one prompt, pinned and described."""

    regions: list[Region]
    producers: list[KVProducer]
    described: KVDescriptor


class UnequalSuite(TransportHarness):
    """See the module."""

    checksum = False
    """Whether producers give checksums, which needs torch."""

    def test_other_ranks_and_block_sizes(self) -> None:
        """1, 2 and 4 ranks each way, each with other blocks, a random prompt and a random skip."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        for order in ORDERS:
            for theirs in (1, 2, 4):
                for ours in (1, 2, 4):
                    sizes = rng.choice([(8, 16), (16, 8), (8, 8), (16, 32), (5, 12)])
                    self.move(rng, unequal_layout(order, 1), (theirs, ours), sizes)

    def test_more_ranks_than_heads(self) -> None:
        """Several ranks serve one head; readers take one each."""
        rng = random.Random(5)
        for order in ORDERS:
            for ranks in ((4, 1), (1, 4), (4, 2), (2, 4), (4, 4)):
                self.move(rng, unequal_layout(order, 1, heads=2), ranks, (8, 16))

    def test_a_missing_rank_and_another_order_are_refused(self) -> None:
        """Before anything moves."""
        rng = random.Random(3)
        layout = unequal_layout("head_major", 8)
        content = rows.random_rows(rng, layout, 20)
        with self.producing_ranks(rng, ranks_of(layout, 2, 8), content, 20) as ranks:
            half = ranks.producers[0].pin("half", [1, 2, 3], range(20))
            with self.reading_rank(layout) as (consumer, region):
                raises(BadDescriptor, lambda: consumer.pull(half, [0, 1, 2]))
                raises(PoolExhausted, lambda: consumer.pull(ranks.described, [0, 1]))
            with self.reading_rank(unequal_layout("token_major", 8)) as (consumer, region):
                raises(LayoutMismatch, lambda: consumer.pull(ranks.described, [0, 1, 2]))
                blank = bytes([rows.FILLER]) * region.block_bytes
                assert self.read_block(region, 0) == blank
            with self.reading_rank(layout.of(block_size=8, tp_size=4, tp_rank=1)) as (consumer, _):
                consumer.pull(half, [0, 1, 2])  # all that it needs is there

    def move(
        self,
        rng: random.Random,
        layout: KVLayout,
        tp_sizes: tuple[int, int],
        block_sizes: tuple[int, int],
        num_tokens: int | None = None,
    ) -> None:
        """One prompt from ranks to ranks, compared row by row."""
        sources, targets = (
            ranks_of(layout, tp_size, size)
            for tp_size, size in zip(tp_sizes, block_sizes, strict=True)
        )
        size = targets[0].block_size
        most = min(sources[0].block_size, size) * NUM_BLOCKS
        tokens = num_tokens or rng.randint(1, min(90, most))
        skip = rng.randint(0, -(-tokens // size))
        content = rows.random_rows(rng, layout, tokens + sources[0].block_size)
        what = f"{layout.order}: {tp_sizes} ranks, blocks of {block_sizes}, {tokens} tokens"
        whole = sources[0].block_size == size and sources[0].heads == targets[0].heads
        with self.producing_ranks(rng, sources, content, tokens) as ranks:
            for target in targets:
                into = rng.sample(range(NUM_BLOCKS), -(-tokens // size) - skip)
                with self.reading_rank(target) as (consumer, region):
                    stats = consumer.pull(ranks.described, into, skip_blocks=skip, timeout_s=20)
                    wanted = dict(content)
                    if not whole:  # then nothing behind the last token is read
                        wanted = {row: data for row, data in content.items() if row[2] < tokens}
                    self._compare(target, region, wanted, into, skip, what)
                    given = (tokens - skip * size) * target.block_bytes // size if into else 0
                    assert stats.num_bytes >= given, what

    def _compare(
        self,
        layout: KVLayout,
        region: Region,
        content: dict[rows.Row, bytes],
        into: Sequence[int],
        skip: int,
        what: str,
    ) -> None:
        """Every row that there is arrived, and nothing else was touched."""
        for index, block in enumerate(into, skip):
            expected = rows.pack(layout, content, index)
            assert self.read_block(region, block) == expected, (what, index)
        blank = bytes([rows.FILLER]) * layout.block_bytes
        for block in set(range(NUM_BLOCKS)) - set(into):
            assert self.read_block(region, block) == blank, (what, block)

    @contextmanager
    def producing_ranks(
        self,
        rng: random.Random,
        layouts: Sequence[KVLayout],
        content: dict[rows.Row, bytes],
        num_tokens: int,
    ) -> Iterator[Ranks]:
        """Each rank's region with its blocks of the prompt, in blocks of its own choice."""
        regions, producers, described = [], [], []
        try:
            for layout in layouts:
                region = self.make_region(NUM_BLOCKS, layout.block_bytes)
                regions.append(region)
                table = rng.sample(range(NUM_BLOCKS), -(-num_tokens // layout.block_size))
                region.bump(table[::2])
                for index, block in enumerate(table):
                    self.write_block(region, block, rows.pack(layout, content, index))
                producer = KVProducer(
                    region,
                    [self.make()],
                    layout=layout,
                    producer=f"p#{layout.tp_rank}",
                    host=HOST,
                    epoch=7 + layout.tp_rank,
                    checksum=self.checksum,
                )
                producers.append(producer)
                described.append(producer.pin("x", table, range(num_tokens)))
            rng.shuffle(described)
            merged = KVDescriptor.from_json(merge_parts(described).to_json())
            yield Ranks(regions, producers, merged)
        finally:
            for producer in producers:
                producer.close()
            for region in regions:
                region.close()

    @contextmanager
    def reading_rank(self, layout: KVLayout) -> Iterator[tuple[KVConsumer, Region]]:
        """A consumer and its pool, full of filler."""
        region = self.make_destination(NUM_BLOCKS, layout.block_bytes)
        for block in range(NUM_BLOCKS):
            self.write_block(region, block, bytes([rows.FILLER]) * layout.block_bytes)
        consumer = KVConsumer(region, [self.make()], layout=layout)
        try:
            yield consumer, region
        finally:
            consumer.close()
            region.close()
