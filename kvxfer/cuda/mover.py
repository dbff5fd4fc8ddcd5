"""Who copies the pieces of a read: a kernel or the device's copy engines.

The engines take no multiprocessor from the work beside them and reach the link's full rate, but
each piece costs them about a microsecond; a kernel copies pieces of any size at the same rate.
Measured figures stand in `benchmarks/NOTES.md`. Without Triton the engines copy all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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

Piece = tuple[int, int, int]
"""Source byte, destination byte, length"""


@cache
def has_kernel() -> bool:
    """Whether Triton is there."""
    return find_spec("triton") is not None


def start(lane: Lane, plan: ReadPlan, source: int, destination: int, by: By = "auto") -> None:
    """Give the read to the lane's stream. The device's context is current."""
    if not plan.moves:
        return
    if by == "auto":
        by = "kernel" if has_kernel() and _mean_bytes(plan) < ENGINES_FROM_BYTES else "engines"
    if by == "kernel":
        _launch(lane, plan, source, destination)
    else:
        _copy(lane, plan, source, destination)


def start_pieces(
    lane: Lane, pieces: Sequence[Piece], source: int, destination: int, by: By = "auto"
) -> None:
    """The same for pieces that no block table tells."""
    spans = tuple(Span(*piece) for piece in pieces)
    start(lane, ReadPlan((), (Move(spans, ((0, 0),)),), 0, 0), source, destination, by)


def _mean_bytes(plan: ReadPlan) -> float:
    return plan.num_bytes / sum(len(move.spans) * len(move.pairs) for move in plan.moves)


def _launch(lane: Lane, plan: ReadPlan, source: int, destination: int) -> None:
    import torch

    from kvxfer.kernels.gather import launch

    table = encode(plan, source, destination)
    words = lane.table(table.words)
    stream = torch.cuda.ExternalStream(lane.stream, device=lane.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        launch(words, table.shape, min(PROGRAMS, table.num_tiles))


def _copy(lane: Lane, plan: ReadPlan, source: int, destination: int) -> None:
    if plan.is_whole:
        size = plan.src_block_bytes
        pairs = [pair for move in plan.moves for pair in move.pairs]
        to = [destination + dst * size for _, dst in pairs]
        driver().copy_batch(
            to, [source + src * size for src, _ in pairs], [size] * len(to), lane.stream
        )
        return
    pieces = plan.pieces()
    driver().copy_batch(
        [destination + dst for _, dst, _ in pieces],
        [source + src for src, _, _ in pieces],
        [num_bytes for _, _, num_bytes in pieces],
        lane.stream,
    )
