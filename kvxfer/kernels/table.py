"""A read as numbers that the gather kernel walks over: one flat table of 64-bit words.

    words 0 to 4         where the source and the destination begin, bytes of a source block and of
                         a destination block, number of groups
    words 8 + 8 g …      group g: bytes of a span, rows of a span, number of spans, first word of
                         its spans, number of pairs, first word of its pairs
    spans                (within a source block, within a destination block), bytes
    pairs                (source block, destination block)

A group copies each of its spans for each of its pairs; its spans are equally long. A kernel moves
rows of `Shape.row_bytes`, the last of a span perhaps shorter, `Shape.rows` of them at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from math import gcd
from typing import NamedTuple

from kvxfer.plan import Move, ReadPlan, Span

HEAD_WORDS, GROUP_WORDS = 8, 8
_LEAST_ROW_BYTES = 16
_EVEN_FROM_BYTES = 512
"""Rows that fit exactly are taken only if they are at least so long."""
TILE_BYTES = 32768
"""What a kernel has on its way at once, for each program."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    unit: int
    """Bytes of one access: every address and length is a multiple."""
    row_bytes: int
    rows: int
    """In a tile."""
    even: bool
    """Whether every span is whole rows."""


class Table(NamedTuple):
    """A read, encoded."""

    words: array[int]
    shape: Shape
    num_tiles: int
    """Of the group with most."""


def encode(plan: ReadPlan, source: int, destination: int, *, tile_bytes: int = TILE_BYTES) -> Table:
    """The plan's read between blocks 0 at these addresses."""
    groups = [part for move in plan.moves for part in _equally_long(move) if part.pairs]
    lengths = [move.spans[0].num_bytes for move in groups]
    shape = _shape(plan, groups, lengths, (source, destination), tile_bytes)
    head = [source, destination, plan.src_block_bytes, plan.dst_block_bytes, len(groups), 0, 0, 0]
    at = HEAD_WORDS + GROUP_WORDS * len(groups)
    tables = array("q")
    most = 0
    for move, length in zip(groups, lengths, strict=True):
        rows_of_span = -(-length // shape.row_bytes)
        spans_at = at + len(tables)
        tables.extend(chain.from_iterable((src, dst) for src, dst, _ in move.spans))
        pairs_at = at + len(tables)
        tables.extend(chain.from_iterable(move.pairs))
        head += [length, rows_of_span, len(move.spans), spans_at, len(move.pairs), pairs_at, 0, 0]
        most = max(most, len(move.pairs) * len(move.spans) * rows_of_span)
    words = array("q", head)
    words += tables
    return Table(words, shape, -(-most // shape.rows))


def _equally_long(move: Move) -> list[Move]:
    if len(move.spans) == 1:
        return [move]
    by_length: dict[int, list[Span]] = {}
    for span in move.spans:
        by_length.setdefault(span.num_bytes, []).append(span)
    return [Move(tuple(spans), move.pairs) for length, spans in by_length.items() if length]


def _shape(
    plan: ReadPlan,
    groups: Sequence[Move],
    lengths: Sequence[int],
    bases: tuple[int, int],
    tile_bytes: int,
) -> Shape:
    """The widest accesses and the longest rows that fit all of it."""
    offsets = (number for move in groups for span in move.spans for number in span)
    common = gcd(*bases, plan.src_block_bytes, plan.dst_block_bytes, *offsets)
    unit = next((unit for unit in (16, 4) if common % unit == 0), 1)
    whole = gcd(*lengths)
    tile_bytes = tile_bytes * unit // 16
    row_bytes = min(tile_bytes, whole & -whole) if whole else _LEAST_ROW_BYTES
    even = row_bytes >= min(_EVEN_FROM_BYTES, max(lengths, default=0))
    if not even:
        longest = 1 << (max(lengths) - 1).bit_length()
        row_bytes = max(_LEAST_ROW_BYTES, min(tile_bytes, longest))
    return Shape(unit, row_bytes, max(1, tile_bytes // row_bytes), even)
