"""Writes K and V of a step's tokens into their slots of the pool.

A slot is `block * block_size + offset`; a token whose slot is negative is written nowhere
(padding of a captured batch). One program takes some tokens of one KV head.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.scores import power_of_two
from pdbatch.engine.kvcache import PagedKVCache


@triton.jit(do_not_specialize=["count"])
def _write(
    k_ptr,
    v_ptr,
    pool_ptr,
    slots,
    count,
    k_head,
    k_token,
    v_head,
    v_token,
    block_stride,
    k_offset,
    v_offset,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    t_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d_D = tl.arange(0, WIDTH)
    slot_T = tl.load(slots + t_T, mask=t_T < count, other=-1)
    mask_TD = (slot_T >= 0)[:, None] & (d_D < D)[None, :]
    long_T = t_T.to(tl.int64)
    k_TD = tl.load(k_ptr + head * k_head + long_T[:, None] * k_token + d_D[None, :], mask=mask_TD)
    v_TD = tl.load(v_ptr + head * v_head + long_T[:, None] * v_token + d_D[None, :], mask=mask_TD)
    at_T = (slot_T // BLOCK).to(tl.int64) * block_stride + (slot_T % BLOCK) * D
    to_TD = pool_ptr + head * (BLOCK * D) + at_T[:, None] + d_D[None, :]
    tl.store(to_TD + k_offset, k_TD, mask=mask_TD)
    tl.store(to_TD + v_offset, v_TD, mask=mask_TD)


def write(
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    slots: torch.Tensor,
    tokens: int = 16,
) -> None:
    """`slots` is int32 [T], on the device."""
    shape = cache.shape
    count, page = k_HTD.shape[1], shape.block_size * shape.head_dim
    layer_at = layer * 2 * shape.num_kv_heads * page
    _write[(triton.cdiv(count, tokens), shape.num_kv_heads)](
        k_HTD,
        v_HTD,
        cache.pool,
        slots,
        count,
        k_HTD.stride(0),
        k_HTD.stride(1),
        v_HTD.stride(0),
        v_HTD.stride(1),
        cache.pool.stride(0),
        layer_at,
        layer_at + shape.num_kv_heads * page,
        D=shape.head_dim,
        WIDTH=power_of_two(shape.head_dim, 16),
        BLOCK=shape.block_size,
        TOKENS=tokens,
        num_warps=4,
    )
