"""What one read copies: pieces of the source's blocks into pieces of the destination's.

Between equal ends that is whole blocks. Where the ends differ in block size or serve different
heads, each pair of blocks shares a few patterns of spans, and a plan names each pattern once
(`Move`), so that a plan stays small and a kernel can walk over it in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Bytes within a source block and within a destination block."""

    src: int
    dst: int
    num_bytes: int


class Move(NamedTuple):
    """Every span for every pair of blocks."""

    spans: tuple[Span, ...]
    pairs: tuple[tuple[int, int], ...]
    """(source block, destination block)"""

    @property
    def num_bytes(self) -> int:
        """Bytes that it copies."""
        return len(self.pairs) * sum(span.num_bytes for span in self.spans)


class ReadPlan(NamedTuple):
    """One read of one region into another. No two pieces overlap at the destination."""

    src_blocks: tuple[int, ...]
    """Distinct blocks that are read, in the order in which their generations are wanted."""
    moves: tuple[Move, ...]
    src_block_bytes: int
    dst_block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied."""
        found = 0
        for spans, pairs in self.moves:
            found += len(pairs) * sum([num_bytes for _, _, num_bytes in spans])
        return found

    @property
    def is_whole(self) -> bool:
        """Whether blocks are copied from end to end and nothing else is done."""
        return self.src_block_bytes == self.dst_block_bytes and all(
            move.spans == (Span(0, 0, self.src_block_bytes),) for move in self.moves
        )

    def pieces(self) -> list[tuple[int, int, int]]:
        """(source byte, destination byte, length), each counted from the region's block 0.

        What neighbours on both sides is one piece.
        """
        found: list[tuple[int, int, int]] = []
        at = to = size = 0
        for spans, pairs in self.moves:
            for src_block, dst_block in pairs:
                src0, dst0 = src_block * self.src_block_bytes, dst_block * self.dst_block_bytes
                for src, dst, num_bytes in spans:
                    if src0 + src == at + size and dst0 + dst == to + size:
                        size += num_bytes
                        continue
                    if size:
                        found.append((at, to, size))
                    at, to, size = src0 + src, dst0 + dst, num_bytes
        if size:
            found.append((at, to, size))
        return found


def whole_blocks(
    src_blocks: Sequence[int], dst_blocks: Sequence[int], block_bytes: int
) -> ReadPlan:
    """Each source block into the destination block beside it. Raises ValueError unless there
    are as many of both."""
    new = tuple.__new__  # the kinds' own would be three calls more in every pull
    if len(src_blocks) != len(dst_blocks):
        raise ValueError(f"{len(src_blocks)} source blocks, {len(dst_blocks)} destination blocks")
    pairs = tuple(zip(src_blocks, dst_blocks))  # noqa: B905 - a keyword takes as long as the rest
    move = new(Move, ((new(Span, (0, 0, block_bytes)),), pairs))
    moves = (move,) if pairs else ()
    return new(ReadPlan, (tuple(src_blocks), moves, block_bytes, block_bytes))
