"""Attention of chunks of prompts, over what stands before them and themselves.

The step's chunks are cut into tiles of tokens; a tile's rows are its tokens times the query
heads of one KV head, so that each page that is read meets all of them. A tile is
`(row, first)`: the sequence and its first token, counted from the chunk's beginning. All keys,
the chunk's own too, come from the pool, where they were written before. Tiles that read most
come first, so that the last programs are short.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.scores import (
    absorb,
    keys_of_tile,
    page_offsets,
    power_of_two,
    precision,
    scaled,
    window_of,
)
from pdbatch.engine.kvcache import KVShape, PagedKVCache


@triton.jit
def _keys(
    q_RD,
    at_R,
    best_R,
    sum_R,
    out_RD,
    pages,
    k_offset,
    v_offset,
    tables,
    table_at,
    block_stride,
    start,
    end,
    length,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys [start, end); without MASKED every row sees all of them."""
    d_D = tl.arange(0, WIDTH)
    n_N = tl.arange(0, TILE)
    for begin in range(start, end, TILE):
        at_N = begin + n_N
        there_N = at_N < length if MASKED else at_N >= 0
        offset_N = page_offsets(tables, table_at, at_N, there_N, block_stride, D, BLOCK)
        real_ND = there_N[:, None] & (d_D < D)[None, :]
        k_ND = tl.load(pages + k_offset + offset_N[:, None] + d_D[None, :], mask=real_ND, other=0.0)
        scores_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=PRECISION)
        scores_RN = scaled(scores_RN, scale, softcap, CAPPED)
        if MASKED:
            seen_RN = (at_N[None, :] <= at_R[:, None]) & there_N[None, :]
            if WINDOWED:
                seen_RN = seen_RN & (at_N[None, :] > at_R[:, None] - window)
            scores_RN = tl.where(seen_RN, scores_RN, float("-inf"))
        v_ND = tl.load(pages + v_offset + offset_N[:, None] + d_D[None, :], mask=real_ND, other=0.0)
        best_R, sum_R, out_RD = absorb(scores_RN, v_ND, best_R, sum_R, out_RD, PRECISION)
    return best_R, sum_R, out_RD


@triton.jit
def _chunk(
    q_ptr,
    out_ptr,
    pool_ptr,
    tables,
    tables_at,
    lens,
    starts,
    tiles,
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
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.load(tiles + tile * 2)
    first = tl.load(tiles + tile * 2 + 1)
    begins = tl.load(starts + row)
    queries = tl.load(starts + row + 1) - begins
    length = tl.load(lens + row)
    table_at = tl.load(tables_at + row)
    TOKENS: tl.constexpr = ROWS // PADDED
    r_R = tl.arange(0, ROWS)
    token_R = first + r_R // PADDED
    g_R = r_R % PADDED
    d_D = tl.arange(0, WIDTH)
    before = length - queries
    at_R = before + token_R
    real_RD = ((token_R < queries) & (g_R < GROUP))[:, None] & (d_D < D)[None, :]
    query_RD = (begins + token_R).to(tl.int64)[:, None] * q_token
    q_RD = tl.load(
        q_ptr + query_RD + (head * GROUP + g_R)[:, None] * q_head + d_D[None, :],
        mask=real_RD,
        other=0.0,
    )
    best_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RD = tl.zeros([ROWS, WIDTH], tl.float32)
    pages = pool_ptr + head * (BLOCK * D)
    # keys up to `clear` are seen by every row of the tile; those after it need the mask
    end = tl.minimum(before + first + TOKENS, length)
    clear = ((before + first + 1) // TILE) * TILE
    start = 0
    if WINDOWED:
        start = tl.maximum(0, before + first - window + 1) // TILE * TILE
        clear = start
    best_R, sum_R, out_RD = _keys(
        q_RD,
        at_R,
        best_R,
        sum_R,
        out_RD,
        pages,
        k_offset,
        v_offset,
        tables,
        table_at,
        block_stride,
        start,
        clear,
        length,
        scale,
        softcap,
        window,
        D,
        WIDTH,
        BLOCK,
        TILE,
        False,
        CAPPED,
        WINDOWED,
        PRECISION,
    )
    best_R, sum_R, out_RD = _keys(
        q_RD,
        at_R,
        best_R,
        sum_R,
        out_RD,
        pages,
        k_offset,
        v_offset,
        tables,
        table_at,
        block_stride,
        clear,
        end,
        length,
        scale,
        softcap,
        window,
        D,
        WIDTH,
        BLOCK,
        TILE,
        True,
        CAPPED,
        WINDOWED,
        PRECISION,
    )
    out_RD = out_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    to_RD = (begins + token_R).to(tl.int64)[:, None] * out_token
    tl.store(
        out_ptr + to_RD + (head * GROUP + g_R)[:, None] * out_head + d_D[None, :],
        out_RD.to(out_ptr.dtype.element_ty),
        mask=real_RD,
    )


def rows_of_tile(group: int, shape: KVShape, queries: float) -> tuple[int, int]:
    """(rows of a tile, tokens that they hold) for chunks of about so many queries.

    Where chunks are long enough, a tile of 256 rows has each page read half as often.
    """
    padded = power_of_two(group)
    rows = 128 if shape.head_dim <= 128 else 64
    if shape.head_dim <= 128 and shape.dtype.itemsize == 2 and queries * padded >= 256:
        rows = 256
    rows = max(rows, padded)
    return rows, rows // padded


def chunk(
    q_THD: torch.Tensor,
    out_THD: torch.Tensor,
    cache: PagedKVCache,
    layer: int,
    *,
    tables: torch.Tensor,
    tables_at: torch.Tensor,
    lens: torch.Tensor,
    starts: torch.Tensor,
    tiles_X2: torch.Tensor,
    rows: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> None:
    """Attend all tiles of `rows` rows; `starts` are the offsets into T of all sequences."""
    shape = cache.shape
    group = q_THD.shape[1] // shape.num_kv_heads
    page = shape.block_size * shape.head_dim
    layer_at = layer * 2 * shape.num_kv_heads * page
    wide = q_THD.dtype == torch.float32
    _chunk[(shape.num_kv_heads, tiles_X2.shape[0])](
        q_THD,
        out_THD,
        cache.pool,
        tables,
        tables_at,
        lens,
        starts,
        tiles_X2,
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
        GROUP=group,
        PADDED=power_of_two(group),
        ROWS=rows,
        D=shape.head_dim,
        WIDTH=power_of_two(shape.head_dim, 16),
        BLOCK=shape.block_size,
        TILE=tile or keys_of_tile(shape),
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        PRECISION=precision(q_THD.dtype),
        num_warps=num_warps or (4 if rows < 128 else 8),
        num_stages=num_stages or (2 if wide else 3),
    )
