"""What the attention kernels have in common: one tile of keys met by some rows of queries.

Legend: R rows (query heads of one KV head, of one token or of several), N keys of a tile,
D head size (padded to a power of two).
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kvcache import KVShape

_TILE_BYTES = 16384


@triton.jit
def page_offsets(
    tables,
    table_at,
    at_N,
    seen_N,
    block_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[N] where the keys at positions `at_N` of one sequence lie, from a head's first token."""
    block_N = tl.load(tables + table_at + at_N // BLOCK, mask=seen_N, other=0)
    return block_N.to(tl.int64) * block_stride + (at_N % BLOCK) * D


@triton.jit
def scaled(scores_RN, scale, softcap, CAPPED: tl.constexpr):
    """Scores in units of log2: softly capped where the model asks for it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); exp may become infinite, which gives 1
        twice_RN = scores_RN * (scale * 2.0 / softcap)
        tanh_RN = 1.0 - 2.0 / (1.0 + tl.exp2(twice_RN * LOG2E))
        return tanh_RN * (softcap * LOG2E)
    else:
        return scores_RN * (scale * LOG2E)


@triton.jit
def absorb(scores_RN, v_ND, best_R, sum_R, out_RD, PRECISION: tl.constexpr):
    """One step of the running softmax; scores of unseen keys are -inf."""
    new_R = tl.maximum(best_R, tl.max(scores_RN, 1))
    safe_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    weight_RN = tl.exp2(scores_RN - safe_R[:, None])
    decay_R = tl.exp2(best_R - safe_R)
    sum_R = sum_R * decay_R + tl.sum(weight_RN, 1)
    out_RD = out_RD * decay_R[:, None]
    out_RD = tl.dot(weight_RN.to(v_ND.dtype), v_ND, out_RD, input_precision=PRECISION)
    return new_R, sum_R, out_RD


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << (count - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are computed: float32 is not rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def keys_of_tile(shape: KVShape, most: int = 64) -> int:
    """Keys that a kernel takes at a time, so that three tiles of K and V fit on a processor."""
    row_bytes = power_of_two(shape.head_dim, 16) * shape.dtype.itemsize
    return max(16, min(most, _TILE_BYTES // row_bytes))


def window_of(window: int | None) -> int:
    """As the kernels take it: 0 is none."""
    return window or 0
