"""Who copies the pieces of a read: a kernel or the device's copy engines.

The engines take no multiprocessor from the work beside them and reach the link's full rate, but
each piece costs them about a microsecond; a kernel copies pieces of any size at the same rate.
Measured figures stand in `benchmarks/NOTES.md`. Without Triton the engines copy all.

The engines begin a batch when the whole call for it was made, and a call costs a microsecond a
piece. So a read is given to them in batches: a short one first, so that bytes move soon, and each
of the next made ready while the one before is on its way, on two streams in turn.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal

from kvxfer.cuda.driver import driver
from kvxfer.cuda.lanes import Lane
from kvxfer.kernels.table import encode
from kvxfer.plan import Move, ReadPlan, Span

logger = logging.getLogger(__name__)

By = Literal["auto", "kernel", "engines"]
ENGINES_FROM_BYTES = 1 << 20
"""Pieces of a peer's memory that are at least so long on average go by the engines."""
PROGRAMS = 32
"""Of the kernel, at most: multiprocessors that a read takes."""
FIRST_BYTES, GROWTH = 8 << 20, 3
"""The engines' first batch, and how much longer each of the next is."""

Piece = tuple[int, int, int]
"""Source byte, destination byte, length"""
Numbers = tuple["array[int]", "array[int]", "array[int]"]
"""Destinations, sources, lengths of a batch"""


@cache
def has_kernel() -> bool:
    """Whether Triton is there."""
    return find_spec("triton") is not None


def chosen(plan: ReadPlan, by: By = "auto") -> By:
    """Who copies it: `by`, unless that is "auto"."""
    if by != "auto":
        return by
    if not has_kernel():
        return "engines"
    if plan.is_whole:
        return "engines" if plan.src_block_bytes >= ENGINES_FROM_BYTES else "kernel"
    pieces = sum(len(move.spans) * len(move.pairs) for move in plan.moves)
    return "engines" if plan.num_bytes >= ENGINES_FROM_BYTES * pieces else "kernel"


def start(
    lane: Lane,
    plan: ReadPlan,
    source: int,
    destination: int,
    by: By = "auto",
    *,
    split: bool = False,
    brief_bytes: int = 0,
) -> None:
    """Give the read to the lane's stream. The device's context is current.

    `split`: the engines may use the lane beside it as well; nothing is under way in either, and
    whoever goes on with the stream calls `join` before. Of a longer read `wait` then sleeps until
    no more than the last `brief_bytes` are missing.
    """
    if not plan.moves:
        return
    if chosen(plan, by) == "kernel":
        _launch(lane, plan, source, destination)
        return
    count, numbers = _numbers(plan, source, destination)
    if not split:
        driver().copy_batch(*numbers(0, count), lane.stream)
        return
    size = plan.src_block_bytes if plan.is_whole else max(1, plan.num_bytes // count)
    awake = count - brief_bytes // size if 0 < brief_bytes < size * count else count
    here, there = lane, lane.beside() if count > 1 else lane
    for first, last in _batches(count, max(1, FIRST_BYTES // size), awake):
        driver().copy_batch(*numbers(first, last), here.stream)
        if last == awake < count:
            lane.mark(here)
        here, there = there, here


def start_pieces(
    lane: Lane, pieces: Sequence[Piece], source: int, destination: int, by: By = "auto"
) -> None:
    """The same for pieces that no block table tells."""
    spans = tuple(Span(*piece) for piece in pieces)
    start(lane, ReadPlan((), (Move(spans, ((0, 0),)),), 0, 0), source, destination, by)


def _launch(lane: Lane, plan: ReadPlan, source: int, destination: int) -> None:
    from kvxfer.kernels.gather import launch_on

    table = encode(plan, source, destination)
    words = lane.table(table.words)
    launch_on(lane.device, lane.stream, words, table.shape, min(PROGRAMS, table.num_tiles))


def _batches(count: int, size: int, border: int) -> Iterator[tuple[int, int]]:
    """(first piece, the one after the last) of each. One ends at the border; one comes after."""
    at = 0
    while at < border:
        end = min(at + size, border)
        yield at, end
        at, size = end, size * GROWTH
    if border < count:
        yield border, count


def _numbers(
    plan: ReadPlan, source: int, destination: int
) -> tuple[int, Callable[[int, int], Numbers]]:
    """How many pieces there are, and a function that tells a range of them."""
    if plan.is_whole:
        size = plan.src_block_bytes
        moves = plan.moves
        pairs = moves[0].pairs if len(moves) == 1 else [p for move in moves for p in move.pairs]

        def of_blocks(first: int, last: int) -> Numbers:
            part = pairs[first:last]
            return (
                array("Q", [destination + dst * size for _, dst in part]),
                array("Q", [source + src * size for src, _ in part]),
                array("Q", [size]) * len(part),
            )

        return len(pairs), of_blocks
    pieces = plan.pieces()

    def of_pieces(first: int, last: int) -> Numbers:
        part = pieces[first:last]
        return (
            array("Q", [destination + dst for _, dst, _ in part]),
            array("Q", [source + src for src, _, _ in part]),
            array("Q", [num_bytes for _, _, num_bytes in part]),
        )

    return len(pieces), of_pieces
