"""Every transport brings the bytes that were asked for, and touches no others."""

from __future__ import annotations

import random
from functools import partial

from kvxfer import KVConsumer, Move, ReadPlan, Span
from kvxfer.testing.harness import LAYOUTS, NUM_BLOCKS, TransportHarness, together

_UNITS = (8, 60, 512)
"""Bytes that spans are multiples of: an odd head, a small one, a large one."""


class EqualitySuite(TransportHarness):
    """Equal bytes."""

    def test_equal_bytes_for_random_tables_and_layouts(self) -> None:
        """Any blocks into any others, in any order."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        for layout in LAYOUTS:
            blank = bytes(layout.block_bytes)
            with self.pair(layout) as pair:
                for turn in range(20):
                    count = rng.randint(1, NUM_BLOCKS)
                    blocks = rng.sample(range(NUM_BLOCKS), count)
                    into = rng.sample(range(NUM_BLOCKS), count)
                    for block in range(NUM_BLOCKS):
                        self.write_block(pair.destination, block, blank)
                    skip = rng.randrange(count)
                    described = pair.offer(blocks, str(turn))
                    stats = pair.consumer.pull(described, into[skip:], skip_blocks=skip)
                    pair.assert_equal(blocks[skip:], into[skip:])
                    assert stats.num_bytes == (count - skip) * layout.block_bytes
                    for block in set(range(NUM_BLOCKS)) - set(into[skip:]):
                        assert self.read_block(pair.destination, block) == blank, block
                    assert pair.producer.unpin(str(turn)) == tuple(blocks)

    def test_equal_bytes_for_random_plans(self) -> None:
        """Parts of blocks into parts of blocks of another size, as unequal ends need it."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        for unit in _UNITS:
            src_bytes, dst_bytes = 12 * unit, 20 * unit
            source, mine = self.make_region(24, src_bytes), self.make_destination(24, dst_bytes)
            source.bump(range(5))
            content = bytearray(rng.randbytes(24 * src_bytes))
            for block in range(24):
                at = block * src_bytes
                self.write_block(source, block, bytes(content[at : at + src_bytes]))
            server, way = self.make(), self.make()
            address = server.serve(source)
            for _ in range(10):
                plan = _random_plan(rng, unit)
                expected = bytearray(24 * dst_bytes)
                for block in range(24):
                    self.write_block(mine, block, bytes(dst_bytes))
                for src, dst, size in plan.pieces():
                    expected[dst : dst + size] = content[src : src + size]
                stamp = way.read(address, plan, mine, 20.0)
                assert list(stamp.generations) == source.stamps(plan.src_blocks)
                found = b"".join(self.read_block(mine, block) for block in range(24))
                assert found == bytes(expected)
            way.close()
            server.close()
            source.close()
            mine.close()

    def test_concurrent_readers_get_their_own_blocks(self) -> None:
        """Eight threads, one consumer, different destinations."""
        with self.pair() as pair:
            described = [pair.offer([i, 63 - i], str(i)) for i in range(8)]

            def pull(i: int) -> None:
                for _ in range(25):
                    pair.consumer.pull(described[i], [2 * i, 2 * i + 1])
                    pair.assert_equal([i, 63 - i], [2 * i, 2 * i + 1])

            errors = together([partial(pull, i) for i in range(8)])
            assert not errors, errors

    def test_readers_of_their_own_share_a_producer(self) -> None:
        """Four consumers, each with its own transport and pool."""
        with self.pair() as pair, self.reader() as a, self.reader() as b, self.reader() as c:
            described = pair.offer([9, 4, 7])
            expected = [self.read_block(pair.source, block) for block in (9, 4, 7)]

            def pull(reader: KVConsumer) -> None:
                for turn in range(25):
                    into = [turn % 8, (turn + 1) % 8, (turn + 2) % 8]
                    reader.pull(described, into)
                    assert [self.read_block(reader.region, i) for i in into] == expected

            errors = together([partial(pull, reader) for reader in (pair.consumer, a, b, c)])
            assert not errors, errors


def _random_plan(rng: random.Random, unit: int) -> ReadPlan:
    """From 24 blocks of 12 units into 24 of 20; some source bytes are read twice."""
    sources, targets = rng.sample(range(24), 8), rng.sample(range(24), 12)
    moves = []
    for first in range(0, 12, 4):
        cuts = sorted(rng.sample(range(21), 6))
        spans = []
        for at, end in zip(cuts[::2], cuts[1::2], strict=True):
            size = min(end - at, 12)
            src = rng.randrange(12 - size + 1)
            spans.append(Span(src * unit, at * unit, size * unit))
        pairs = tuple((rng.choice(sources), dst) for dst in targets[first : first + 4])
        moves.append(Move(tuple(spans), pairs))
    used = dict.fromkeys(src for move in moves for src, _ in move.pairs)
    return ReadPlan(tuple(used), tuple(moves), 12 * unit, 20 * unit)
