"""Attention of decodes: one query token a sequence, over its pages, in pieces of equal work.

A work item is `(row, start, end, part)`: the keys [start, end) of one sequence. One program
does one item and one KV head; the query heads of its group are the rows of one product. An item
with part -1 is all of its sequence and finished there; the others leave partial results (output
and log-sum-exp) in that place, which `merge` joins. The number of programs depends on the number
of items that there is room for; items with row -1 are nobody's.

With `beside`, the kernel before it is `shared` of the same step, which has waited for what both
read: programs begin while that one runs and wait for its end before their own.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next
from pdbatch.engine.kernels.scores import (
    absorb,
    keys_of_tile,
    page_offsets,
    power_of_two,
    precision,
    scaled,
    window_of,
)
from pdbatch.engine.kvcache import PagedKVCache

_MANY = 2048


@triton.jit
def _decode(
    q_ptr,
    out_ptr,
    pool_ptr,
    tables,
    tables_at,
    lens,
    items,
    part_out,
    part_lse,
    q_token,
    q_head,
    out_token,
    out_head,
    block_stride,
    k_offset,
    v_offset,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BESIDE: tl.constexpr,
):
    after_previous(DEPENDENT and not BESIDE)
    item = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(items + item * 4)
    start = tl.load(items + item * 4 + 1)
    end = tl.load(items + item * 4 + 2)
    part = tl.load(items + item * 4 + 3)
    if row < 0:
        after_previous(DEPENDENT and BESIDE)
        return
    table_at = tl.load(tables_at + row)
    if WINDOWED:
        start = tl.maximum(start, tl.load(lens + row) - window)
    g_R = tl.arange(0, ROWS)
    d_D = tl.arange(0, WIDTH)
    n_N = tl.arange(0, TILE)
    real_RD = (g_R < GROUP)[:, None] & (d_D < D)[None, :]
    q_RD = tl.load(
        q_ptr + row * q_token + (head * GROUP + g_R)[:, None] * q_head + d_D[None, :],
        mask=real_RD,
        other=0.0,
    )
    best_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RD = tl.zeros([ROWS, WIDTH], tl.float32)
    pages = pool_ptr + head * (BLOCK * D)
    for begin in range(start, end, TILE):
        at_N = begin + n_N
        seen_N = at_N < end
        offset_N = page_offsets(tables, table_at, at_N, seen_N, block_stride, D, BLOCK)
        real_ND = seen_N[:, None] & (d_D < D)[None, :]
        k_ND = tl.load(pages + k_offset + offset_N[:, None] + d_D[None, :], mask=real_ND, other=0.0)
        v_ND = tl.load(pages + v_offset + offset_N[:, None] + d_D[None, :], mask=real_ND, other=0.0)
        scores_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=PRECISION)
        scores_RN = scaled(scores_RN, scale, softcap, CAPPED)
        scores_RN = tl.where(seen_N[None, :], scores_RN, float("-inf"))
        best_R, sum_R, out_RD = absorb(scores_RN, v_ND, best_R, sum_R, out_RD, PRECISION)
    after_previous(DEPENDENT and BESIDE)
    let_next(DEPENDENT)
    out_RD = out_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    if part < 0:
        to_RD = out_ptr + row * out_token + (head * GROUP + g_R)[:, None] * out_head + d_D[None, :]
        tl.store(to_RD, out_RD.to(out_ptr.dtype.element_ty), mask=real_RD)
    else:
        part_R = (part * HEADS + head) * GROUP + g_R
        tl.store(part_out + part_R[:, None] * D + d_D[None, :], out_RD, mask=real_RD)
        lse_R = tl.where(sum_R > 0, best_R + tl.log2(sum_R), float("-inf"))
        tl.store(part_lse + part_R, lse_R, mask=g_R < GROUP)


def decode(
    q_THD: torch.Tensor,
    out_THD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    *,
    tables: torch.Tensor,
    tables_at: torch.Tensor,
    lens: torch.Tensor,
    items_I4: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    beside: bool = False,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 3,
) -> None:
    """Run the items; rows of `q_THD` and `out_THD` [T, heads, D] are those that items name.

    Programs that fill the device many times are small ones, so that more of them run at a time.

    `part_out` has room for [items, KV heads, group, D] in float32, `part_lse` for one number less.
    """
    shape = cache.shape
    group = q_THD.shape[1] // shape.num_kv_heads
    page = shape.block_size * shape.head_dim
    layer_at = layer * 2 * shape.num_kv_heads * page
    many = items_I4.shape[0] * shape.num_kv_heads >= _MANY
    _decode[(items_I4.shape[0], shape.num_kv_heads)](
        q_THD,
        out_THD,
        cache.pool,
        tables,
        tables_at,
        lens,
        items_I4,
        part_out,
        part_lse,
        q_THD.stride(0),
        q_THD.stride(1),
        out_THD.stride(0),
        out_THD.stride(1),
        cache.pool.stride(0),
        layer_at,
        layer_at + shape.num_kv_heads * page,
        scaling,
        softcap or 1.0,
        window_of(window),
        HEADS=shape.num_kv_heads,
        GROUP=group,
        ROWS=power_of_two(group, 16),
        D=shape.head_dim,
        WIDTH=power_of_two(shape.head_dim, 16),
        BLOCK=shape.block_size,
        TILE=tile or keys_of_tile(shape, 32 if many else 64),
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        PRECISION=precision(q_THD.dtype),
        BESIDE=beside,
        num_warps=num_warps or (2 if many else 4),
        num_stages=num_stages,
        **dependent(q_THD.device),
    )
