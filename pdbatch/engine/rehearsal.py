"""Steps that stand for those to come, run before the first: what they need is compiled by then.

Only the form counts: how many rows, how their keys are cut. They read what lies in block 0 and
write nothing but there, where no content is yet; what they compute is of no use.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pdbatch.engine.attention import decodes
from pdbatch.engine.attention.equal import LEAST_PROMPTS, LEAST_TOKENS
from pdbatch.engine.model_input import ModelInput

_KINDS: tuple[decodes.Kind, ...] = ("whole", "split", "shared")
_SHARED_KEYS = 2048
"""Enough for a family of two to be worth it."""


def decoding(rows: int, sizes: decodes.Sizes, most_keys: int) -> Iterator[ModelInput]:
    """Steps of so many decodes, one for each kind that they can be of."""
    for kind in _KINDS:
        batch = _decodes(rows, kind, sizes.shape.block_size, most_keys)
        if decodes.plan(batch, sizes, rows).kind == kind:
            yield batch


def mixed(sizes: decodes.Sizes, most_keys: int) -> Iterator[ModelInput]:
    """Steps with prompts: without anything before them, with, beside decodes of each kind, and
    equal ones."""
    size = sizes.shape.block_size
    yield _step([], [(0, 8)], size)
    if most_keys > 16:
        yield _step([], [(8, 8), (0, 8)], size)
        yield _step([], [(8, min(256, most_keys - 8))], size)  # long chunks have larger tiles
        for batch in decoding(16, sizes, most_keys):
            yield _step(batch.context_lens, [(0, 8), (8, 8)], size)
    count, length = LEAST_PROMPTS, LEAST_TOKENS
    if sizes.equal is not None and most_keys >= length:
        sizes.equal.expect(count, length)
        yield _step([], [(0, length)] * count, size)


def largest(seqs: int, tokens: int, most_keys: int, block_size: int) -> ModelInput:
    """As many tokens and as many rows of logits as a step may have."""
    seqs = min(seqs, tokens)
    each, more = divmod(min(tokens, seqs * most_keys), seqs)
    return _step([], [(0, each + (seq < more)) for seq in range(seqs)], block_size)


def _decodes(rows: int, kind: decodes.Kind, block_size: int, most_keys: int) -> ModelInput:
    """Families are found by equal blocks, and here all blocks are one."""
    lens = [min(16, most_keys)] * rows
    if kind == "split":
        lens[0] = most_keys
    elif kind == "shared":
        lens = [min(_SHARED_KEYS + 1, most_keys)] * rows
    return _step(lens, [], block_size)


def _step(decoding: list[int], chunks: list[tuple[int, int]], block_size: int) -> ModelInput:
    """Decodes of so many keys, then chunks: (tokens before, tokens). Nothing is written."""
    spans = [(length - 1, 1) for length in decoding] + chunks
    lens = [before + count for before, count in spans]
    offsets = [0]
    for _, count in spans:
        offsets.append(offsets[-1] + count)
    positions = torch.cat([torch.arange(before, before + count) for before, count in spans])
    return ModelInput(
        input_ids_T=torch.zeros_like(positions),
        positions_T=positions,
        slot_mapping_T=torch.full_like(positions, -1),
        cu_seqlens_q=offsets,
        context_lens=lens,
        block_tables_SM=torch.zeros(len(spans), -(-max(lens) // block_size), dtype=torch.int32),
        logits_indices=list(range(len(spans))),
        num_decodes=len(decoding),
    )
