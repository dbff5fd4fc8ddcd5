"""Which cache pages each part of a step reads: computed once, used by every layer.

Legend: S sequences of a group, H KV heads, M blocks, C = M * block_size tokens, P blocks
shared by a group, q and c lengths of queries and keys of one chunk; the 2 is K, V.

Decodes (one token each) are taken together in groups of similar length, so that little is
padded, and of equal beginning, where that is long; chunks of prompts one by one. All page
indices are for layer 0; a layer further on adds `2 * H`. A window cuts off the blocks that no
query of the step can see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.model_input import ModelInput

_WASTE_BLOCKS = 48
"""Blocks read too much that cost about as much as one group more (measured on a CPU)."""
_GROUP_BYTES = 6 << 20
"""K and V of one layer that a group gathers at most on a CPU: what is gathered stays in cache."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query each, their own keys padded to one length.

    Where they begin with the same blocks, those are read once for the whole group.
    """

    rows_S: torch.Tensor | None
    """Which decodes of the step, or None for all of them in order."""
    num_seqs: int
    pages: torch.Tensor
    """Flat page indices of layer 0: [2, H, P] of the shared blocks, then [2, H, S, M]."""
    num_shared: int
    """Tokens in the shared blocks, all of them seen by every query; 0 without any."""
    num_tokens: int
    """C, padding included, shared tokens not."""
    mask_HS1C: torch.Tensor
    """[H * S, 1, C]: 0 where a key is seen, -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several queries of one sequence."""

    start: int
    end: int
    """The chunk's tokens are [start, end) of the step."""
    pages_2HM: torch.Tensor | None
    """Flat page indices of layer 0; None if all keys are the chunk's own."""
    num_keys: int
    mask_qc: torch.Tensor | None
    """Added to the scores; None for plain causal attention of the chunk to itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to attend in the layers that share a window."""

    groups: list[DecodeGroup]
    chunks: list[Chunk]


def build(batch: ModelInput, cache: PagedKVCache, window: int | None) -> Plan:
    """The plan of one step for layers with this window."""
    chunks = [
        _chunk(batch, cache, seq, window)
        for seq in range(batch.num_decodes, len(batch.context_lens))
    ]
    return Plan(groups=_groups(batch, cache, window), chunks=chunks)


def _first_block(first_query: int, window: int | None, block_size: int) -> int:
    """The first block that a query at this position still sees."""
    return 0 if window is None else max(0, first_query - window + 1) // block_size


def _pages(cache: PagedKVCache, blocks: torch.Tensor) -> torch.Tensor:
    """[2, *, H, M] page indices of layer 0 for block ids [*, M], on the CPU."""
    shape = cache.shape
    heads = shape.num_kv_heads
    kv = torch.arange(2) * heads
    first = (blocks.long() * (shape.num_layers * 2 * heads)).unsqueeze(-2)
    pages = kv.view(2, *[1] * first.dim()) + first.unsqueeze(0) + torch.arange(heads)[:, None]
    return pages


def _groups(batch: ModelInput, cache: PagedKVCache, window: int | None) -> list[DecodeGroup]:
    if not batch.num_decodes:
        return []
    size = cache.shape.block_size
    lens = batch.context_lens[: batch.num_decodes]
    first = [_first_block(n - 1, window, size) for n in lens]
    families = _families(batch, size) if window is None else [(list(range(len(lens))), 0)]
    groups = []
    for members, shared in families:
        own = {s: -(-lens[s] // size) - max(first[s], shared) for s in members}
        for part in _cut(sorted(members, key=lambda s: -own[s]), own, _most_blocks(cache)):
            blocks = range(shared, shared + own[part[0]])
            groups.append(_group(batch, cache, window, sorted(part), first, blocks))
    return groups


def _families(batch: ModelInput, block_size: int) -> list[tuple[list[int], int]]:
    """Decodes that share enough leading blocks, each with how many; last those that do not."""
    found, rest = [], []
    by_block: dict[int, list[int]] = {}
    for seq, block in enumerate(batch.block_tables_SM[: batch.num_decodes, 0].tolist()):
        by_block.setdefault(block, []).append(seq)
    for members in by_block.values():
        shared = 0
        if len(members) > 1:
            tables = batch.block_tables_SM[torch.tensor(members)]
            equal = (tables == tables[0]).all(0)
            full = min((batch.context_lens[s] - 1) // block_size for s in members)
            shared = int(equal[:full].long().cumprod(0).sum())
        if (len(members) - 1) * shared >= _WASTE_BLOCKS:
            found.append((members, shared))
        else:
            rest += members
    return [*found, (sorted(rest), 0)] if rest else found


def _most_blocks(cache: PagedKVCache) -> int | None:
    if cache.device.type != "cpu":
        return None
    return max(1, _GROUP_BYTES * cache.shape.num_layers // cache.shape.block_bytes)


def _cut(order: list[int], num_blocks: dict[int, int], most: int | None) -> list[list[int]]:
    """Sequences in falling order of their blocks, cut where padding or memory gets too much."""
    parts: list[list[int]] = []
    waste = 0
    for seq in order:
        if parts:
            longest = num_blocks[parts[-1][0]]
            waste += longest - num_blocks[seq]
            full = most is not None and (len(parts[-1]) + 1) * longest > most
        if not parts or full or waste > _WASTE_BLOCKS:
            parts.append([])
            waste = 0
        parts[-1].append(seq)
    return parts


def _group(
    batch: ModelInput,
    cache: PagedKVCache,
    window: int | None,
    rows: list[int],
    first: list[int],
    blocks: range,
) -> DecodeGroup:
    """One group that reads blocks [0, blocks.start) together, and `blocks` each on its own.

    With a window, `blocks` count from each sequence's first block that is still seen.
    """
    size, heads = cache.shape.block_size, cache.shape.num_kv_heads
    rows_S = torch.tensor(rows)
    tables_SM = batch.block_tables_SM[rows_S]
    lens_S1 = torch.tensor([batch.context_lens[s] for s in rows])[:, None]
    first_S1 = torch.tensor([first[s] for s in rows])[:, None] + blocks.start
    # Past its end a sequence repeats its last block: those keys are finite, and masked.
    blocks_SM = (first_S1 + torch.arange(len(blocks))).minimum((lens_S1 - 1) // size)
    pages = _pages(cache, tables_SM.gather(1, blocks_SM)).transpose(1, 2).flatten()
    if blocks.start:
        pages = torch.cat([_pages(cache, tables_SM[0, : blocks.start]).flatten(), pages])
    position_SC = first_S1 * size + torch.arange(len(blocks) * size)
    seen_SC = position_SC < lens_S1
    if window is not None:
        seen_SC &= position_SC >= lens_S1 - window
    mask_HSC = _additive(seen_SC, cache).expand(heads, -1, -1)
    return DecodeGroup(
        rows_S=None if len(rows) == batch.num_decodes else rows_S.to(cache.device),
        num_seqs=len(rows),
        pages=pages.to(cache.device),
        num_shared=blocks.start * size,
        num_tokens=len(blocks) * size,
        mask_HS1C=mask_HSC.reshape(-1, 1, mask_HSC.shape[2]),
    )


def _chunk(batch: ModelInput, cache: PagedKVCache, seq: int, window: int | None) -> Chunk:
    start, end = batch.cu_seqlens_q[seq], batch.cu_seqlens_q[seq + 1]
    keys, queries = batch.context_lens[seq], end - start
    if keys == queries and (window is None or keys <= window):
        return Chunk(start, end, None, keys, None)
    size = cache.shape.block_size
    first = 0 if keys == queries else _first_block(keys - queries, window, size)
    pages = None
    if keys > queries:
        blocks_M = batch.block_tables_SM[seq, first : -(-keys // size)]
        pages = _pages(cache, blocks_M).flatten().to(cache.device)
    query_q1 = torch.arange(keys - queries, keys)[:, None]
    key_c = torch.arange(first * size, keys)
    seen_qc = key_c <= query_q1
    if window is not None:
        seen_qc &= key_c > query_q1 - window
    return Chunk(start, end, pages, keys - first * size, _additive(seen_qc, cache))


def _additive(seen: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=cache.shape.dtype)
    return mask.masked_fill_(~seen, float("-inf")).to(cache.device)
