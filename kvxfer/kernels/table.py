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


class _Pattern(NamedTuple):
    """Equally long spans of a move."""

    length: int
    num_spans: int
    words: array[int]
    """Where each begins within a source and a destination block."""
    common: int
    """Every one of these numbers, and the length, is a multiple."""


_KEPT = 64
_kept: dict[int, tuple[tuple[Span, ...], list[_Pattern]]] = {}
"""By the identity of the spans, which are the same object in one plan after another."""


def encode(plan: ReadPlan, source: int, destination: int, *, tile_bytes: int = TILE_BYTES) -> Table:
    """The plan's read between blocks 0 at these addresses."""
    groups = [(part, move.pairs) for move in plan.moves if move.pairs for part in _patterns(move)]
    common = gcd(source, destination, plan.src_block_bytes, plan.dst_block_bytes)
    common = gcd(common, *(part.common for part, _ in groups))
    shape = _shape(common, [part.length for part, _ in groups], tile_bytes)
    words = array("q", [source, destination, plan.src_block_bytes, plan.dst_block_bytes])
    words.extend((len(groups), 0, 0, 0))
    at = HEAD_WORDS + GROUP_WORDS * len(groups)
    tables = array("q")
    most = 0
    for part, pairs in groups:
        rows_of_span = -(-part.length // shape.row_bytes)
        spans_at = at + len(tables)
        tables += part.words
        pairs_at = at + len(tables)
        tables.extend(chain.from_iterable(pairs))
        words.extend(
            (part.length, rows_of_span, part.num_spans, spans_at, len(pairs), pairs_at, 0, 0)
        )
        most = max(most, len(pairs) * part.num_spans * rows_of_span)
    words += tables
    return Table(words, shape, -(-most // shape.rows))


def _patterns(move: Move) -> list[_Pattern]:
    found = _kept.get(id(move.spans))
    if found is not None and found[0] is move.spans:
        return found[1]
    by_length: dict[int, list[Span]] = {}
    for span in move.spans:
        by_length.setdefault(span.num_bytes, []).append(span)
    patterns = []
    for length, spans in by_length.items():
        if length:
            words = array("q", [number for span in spans for number in span[:2]])
            patterns.append(_Pattern(length, len(spans), words, gcd(length, *words)))
    if len(move.pairs) > 1:  # else they may well be of this read alone
        if len(_kept) >= _KEPT:
            _kept.clear()
        _kept[id(move.spans)] = move.spans, patterns
    return patterns


def _shape(common: int, lengths: Sequence[int], tile_bytes: int) -> Shape:
    """The widest accesses and the longest rows that fit all of it."""
    unit = next((unit for unit in (16, 4) if common % unit == 0), 1)
    whole = gcd(*lengths)
    tile_bytes = tile_bytes * unit // 16
    row_bytes = min(tile_bytes, whole & -whole) if whole else _LEAST_ROW_BYTES
    even = row_bytes >= min(_EVEN_FROM_BYTES, max(lengths, default=0))
    if not even:
        longest = 1 << (max(lengths) - 1).bit_length()
        row_bytes = max(_LEAST_ROW_BYTES, min(tile_bytes, longest))
    return Shape(unit, row_bytes, max(1, tile_bytes // row_bytes), even)
