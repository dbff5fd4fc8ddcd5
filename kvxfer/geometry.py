"""Which pieces of which rank's blocks a reader takes, and where it puts them.

Producer and reader may share the model's heads among different numbers of ranks, and may have
blocks of different sizes. A reader takes the heads that it serves, from the ranks that have them,
and of the tokens those that it has not yet and that there are.

    tokens       0        16        32        48  52
    producer     |   p0   |   p1    |   p2    | p3|        blocks of 16
    reader       |       r0         |       r1    |        blocks of 32
    cuts         |        |         |         |   |

A cut is a run of tokens within one block of each. Cuts that begin at the same places in their
blocks and are equally long are copied by the same spans, so they make one `Move`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from kvxfer.descriptor import KVDescriptor
from kvxfer.errors import BadDescriptor, KVUsageError, LayoutMismatch, PoolExhausted
from kvxfer.layout import KVLayout
from kvxfer.plan import Move, ReadPlan, Span, whole_blocks


class Cut(NamedTuple):
    """Runs of tokens that lie alike in their blocks at both ends."""

    src_token: int
    """Of the source block, where the run begins."""
    dst_token: int
    num_tokens: int
    pairs: tuple[tuple[int, int], ...]
    """(which of the descriptor's blocks, destination block)"""


class Take(NamedTuple):
    """What is read of one part."""

    part: int
    """Which of the descriptor's."""
    source: KVLayout
    """That rank's."""
    heads: range
    """Those that both ranks serve."""


def check(
    descriptor: KVDescriptor, layout: KVLayout, dst_block_ids: Sequence[int], skip_blocks: int
) -> None:
    """The KV fits, and so do the blocks for it. Raises LayoutMismatch, PoolExhausted,
    KVUsageError."""
    if descriptor.layout != layout.fingerprint:
        raise LayoutMismatch(
            f"the producer's layout is {descriptor.layout}, ours {layout.fingerprint}"
        )
    if skip_blocks < 0:
        raise KVUsageError(f"{skip_blocks} blocks to skip")
    wanted = max(0, -(-descriptor.num_tokens // layout.block_size) - skip_blocks)
    if len(dst_block_ids) != wanted:
        raise PoolExhausted(f"{wanted} blocks to pull, {len(dst_block_ids)} to put them")


def plan_reads(
    descriptor: KVDescriptor,
    layout: KVLayout,
    dst_block_ids: Sequence[int],
    skip_blocks: int = 0,
) -> list[tuple[int, ReadPlan]]:
    """(part of the descriptor, what to read of it) into blocks of a reader with this layout.

    `dst_block_ids` are the reader's for the tokens from its block `skip_blocks` on. Between equal
    ends whole blocks are read, else only tokens that there are. [] where nothing is left to read.
    Raises LayoutMismatch, PoolExhausted, KVUsageError, BadDescriptor (a rank is missing).
    """
    check(descriptor, layout, dst_block_ids, skip_blocks)
    if not dst_block_ids:
        return []
    if descriptor.block_size == layout.block_size and descriptor.tp_size == layout.tp_size:
        for index, part in enumerate(descriptor.parts):
            if part.rank == layout.tp_rank:  # equal ends: nearly every read, so nothing else
                blocks = part.block_ids[skip_blocks:]
                return [(index, whole_blocks(blocks, dst_block_ids, layout.block_bytes))]
    reads: list[tuple[int, ReadPlan]] = []
    found: list[Cut] = []
    for take in takes(descriptor, layout):
        part, source = descriptor.parts[take.part], take.source
        if source.heads == layout.heads and source.block_size == layout.block_size:
            blocks = part.block_ids[skip_blocks:]
            plan = whole_blocks(blocks, dst_block_ids, layout.block_bytes)
        else:
            found = found or cuts(descriptor, layout.block_size, dst_block_ids, skip_blocks)
            first = first_block(descriptor, layout, skip_blocks)
            moves = tuple(
                Move(
                    spans(source, layout, take.heads, cut.src_token, cut.dst_token, cut.num_tokens),
                    tuple((part.block_ids[index], dst) for index, dst in cut.pairs),
                )
                for cut in found
            )
            plan = ReadPlan(part.block_ids[first:], moves, source.block_bytes, layout.block_bytes)
        reads.append((take.part, plan))
    return reads


def first_block(descriptor: KVDescriptor, layout: KVLayout, skip_blocks: int) -> int:
    """The first of the descriptor's blocks that is read."""
    return skip_blocks * layout.block_size // descriptor.block_size


def takes(descriptor: KVDescriptor, layout: KVLayout) -> Iterator[Take]:
    """The parts that a reader needs, and which heads of each.

    Where several ranks serve the same heads, readers that share them too take different ones.
    Raises BadDescriptor, LayoutMismatch (heads that cannot be shared so).
    """
    by_rank = {part.rank: index for index, part in enumerate(descriptor.parts)}
    sizes = descriptor.block_size, descriptor.tp_size
    if sizes == (layout.block_size, layout.tp_size) and layout.tp_rank in by_rank:
        yield Take(by_rank[layout.tp_rank], layout, layout.heads)
        return
    head = layout.heads.start
    copies = max(1, descriptor.tp_size // layout.num_kv_heads)
    while head < layout.heads.stop:
        rank = head * descriptor.tp_size // layout.num_kv_heads + layout.tp_rank % copies
        if rank not in by_rank:
            raise BadDescriptor(f"{descriptor.id} has no part of rank {rank}")
        source = layout.of(
            block_size=descriptor.block_size, tp_size=descriptor.tp_size, tp_rank=rank
        )
        end = min(source.heads.stop, layout.heads.stop)
        yield Take(by_rank[rank], source, range(head, end))
        head = end


def cuts(
    descriptor: KVDescriptor, block_size: int, dst_block_ids: Sequence[int], skip_blocks: int
) -> list[Cut]:
    """The tokens from the reader's block `skip_blocks` on, cut where a block ends at either end."""
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    token = skip_blocks * block_size
    while token < descriptor.num_tokens:
        src_index, src_token = divmod(token, descriptor.block_size)
        dst_index, dst_token = divmod(token, block_size)
        num_tokens = min(
            descriptor.num_tokens - token, descriptor.block_size - src_token, block_size - dst_token
        )
        pair = src_index, dst_block_ids[dst_index - skip_blocks]
        found.setdefault((src_token, dst_token, num_tokens), []).append(pair)
        token += num_tokens
    return [Cut(*places, tuple(pairs)) for places, pairs in found.items()]


@lru_cache(maxsize=128)
def spans(
    source: KVLayout,
    own: KVLayout,
    heads: range,
    src_token: int,
    dst_token: int,
    num_tokens: int,
) -> tuple[Span, ...]:
    """The rows of these heads and tokens in all planes; neighbours on both sides are one span."""
    found: list[Span] = []
    for plane, head, token, rows in _runs(source, heads, num_tokens):
        src = source.offset(plane, head, src_token + token)
        dst = own.offset(plane, head, dst_token + token)
        size = rows * source.row_bytes
        if found:
            last = found[-1]
            if (last.src + last.num_bytes, last.dst + last.num_bytes) == (src, dst):
                found[-1] = Span(last.src, last.dst, last.num_bytes + size)
                continue
        found.append(Span(src, dst, size))
    return tuple(found)


def _runs(layout: KVLayout, heads: range, num_tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """(plane, first head, first token, rows) of what lies in one piece at either end."""
    for plane in range(layout.num_planes):
        if layout.order == "head_major":
            for head in heads:
                yield plane, head, 0, num_tokens
        else:
            for token in range(num_tokens):
                yield plane, heads.start, token, len(heads)
