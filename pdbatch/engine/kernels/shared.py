"""Attention of decodes to a prefix that they share: its pages are read once for many of them.

Decodes whose block tables begin alike form a family. A tile holds as many of its members as
fit into the rows of one product; `(table, keys)` of a tile are where the shared blocks stand
and how many keys they hold, all of them full and seen by every member. The keys are cut into
`splits` pieces, so that a few tiles fill the device. What each member gets is a partial result,
joined with that of its own keys by `merge`.

It lets the next kernel come at once: that is `decode`, which needs nothing of it and, bound by
memory where this one computes, runs beside it.
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
)
from pdbatch.engine.kvcache import PagedKVCache


@triton.jit(do_not_specialize=["first_part", "splits"])  # they change from step to step
def _shared(
    q_ptr,
    pool_ptr,
    tables,
    tiles,
    members,
    part_out,
    part_lse,
    q_token,
    q_head,
    block_stride,
    k_offset,
    v_offset,
    first_part,
    splits,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    let_next(DEPENDENT)
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    table_at = tl.load(tiles + tile * 2)
    keys = tl.load(tiles + tile * 2 + 1)
    if keys <= 0:
        return
    PLACES: tl.constexpr = ROWS // PADDED
    r_R = tl.arange(0, ROWS)
    place_R = tile * PLACES + r_R // PADDED
    g_R = r_R % PADDED
    d_D = tl.arange(0, WIDTH)
    n_N = tl.arange(0, TILE)
    row_R = tl.load(members + place_R)
    real_R = (row_R >= 0) & (g_R < GROUP)
    real_RD = real_R[:, None] & (d_D < D)[None, :]
    q_RD = tl.load(
        q_ptr + row_R[:, None] * q_token + (head * GROUP + g_R)[:, None] * q_head + d_D[None, :],
        mask=real_RD,
        other=0.0,
    )
    each = tl.cdiv(tl.cdiv(keys, splits), TILE) * TILE
    start = split * each
    end = tl.minimum(start + each, keys)
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
    out_RD = out_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    part_R = ((first_part + place_R * splits + split) * HEADS + head) * GROUP + g_R
    tl.store(part_out + part_R[:, None] * D + d_D[None, :], out_RD, mask=real_RD)
    lse_R = tl.where(sum_R > 0, best_R + tl.log2(sum_R), float("-inf"))
    tl.store(part_lse + part_R, lse_R, mask=real_R)


def rows_of_tile(group: int) -> tuple[int, int]:
    """(rows of a tile, members that they hold) for a group of this many query heads."""
    rows = max(64, power_of_two(group))
    return rows, rows // power_of_two(group)


def shared(
    q_THD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    *,
    tables: torch.Tensor,
    tiles_F2: torch.Tensor,
    members: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    first_part: int,
    splits: int,
    scaling: float,
    softcap: float | None,
    tile: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Partial results of every member, from place `first_part` on: member by member, `splits` each.

    `members` names rows of `q_THD`, tile by tile, -1 for empty places.
    """
    shape = cache.shape
    group = q_THD.shape[1] // shape.num_kv_heads
    page = shape.block_size * shape.head_dim
    layer_at = layer * 2 * shape.num_kv_heads * page
    rows, _places = rows_of_tile(group)
    _shared[(tiles_F2.shape[0], shape.num_kv_heads, splits)](
        q_THD,
        cache.pool,
        tables,
        tiles_F2,
        members,
        part_out,
        part_lse,
        q_THD.stride(0),
        q_THD.stride(1),
        cache.pool.stride(0),
        layer_at,
        layer_at + shape.num_kv_heads * page,
        first_part,
        splits,
        scaling,
        softcap or 1.0,
        HEADS=shape.num_kv_heads,
        GROUP=group,
        PADDED=power_of_two(group),
        ROWS=rows,
        D=shape.head_dim,
        WIDTH=power_of_two(shape.head_dim, 16),
        BLOCK=shape.block_size,
        TILE=tile or keys_of_tile(shape),
        CAPPED=softcap is not None,
        PRECISION=precision(q_THD.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
        **dependent(q_THD.device),
    )
