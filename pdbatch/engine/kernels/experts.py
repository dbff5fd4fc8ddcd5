"""Products of rows with the experts that each was sent to, planned and computed on the device.

Legend: T tokens, K experts that each goes to, P = T * K pairs of token and expert (pair p is of
token p // K), E experts, C the model's width, I an expert's inner width.

    order    pairs by expert (stable), and where each expert's begin
    up       gate and up of a tile of columns for all rows of an expert, activated
    down     back to the model's width, times the router's weight, to the pair's own place
    join     the sum over a token's pairs

Each program of `up` and `down` owns one tile of one expert's weights and goes through all of that
expert's rows, so that weights come from memory once however the rows fall. Nothing depends on how
many rows an expert gets but the time: the host never asks, and a CUDA graph can hold it.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.activation import KINDS
from pdbatch.engine.kernels.scores import power_of_two, precision

_ORDER_WIDTH = 1024
_DEPTH_BYTES = 256
_THREE_STAGES_BYTES = 150_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a program computes at a time."""

    rows: int
    cols: int
    depth: int
    """Of the sum, each turn."""
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["pairs"])
def _order(ids_P, order_P, starts_E1, pairs, WIDTH: tl.constexpr):
    expert = tl.program_id(0)
    place = tl.zeros([], tl.int32)
    for at in range(0, pairs, WIDTH):
        p_W = at + tl.arange(0, WIDTH)
        ids_W = tl.load(ids_P + p_W, mask=p_W < pairs, other=0x7FFFFFFF)
        place += tl.sum((ids_W < expert).to(tl.int32), 0)
    tl.store(starts_E1 + expert, place)
    for at in range(0, pairs, WIDTH):
        p_W = at + tl.arange(0, WIDTH)
        mine_W = tl.load(ids_P + p_W, mask=p_W < pairs, other=0x7FFFFFFF) == expert
        before_W = tl.cumsum(mine_W.to(tl.int32), 0)
        tl.store(order_P + place + before_W - 1, p_W, mask=mine_W)
        place += tl.sum(mine_W.to(tl.int32), 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_E1 + expert + 1, place)


@triton.jit
def _activated(gate, KIND: tl.constexpr):
    if KIND == 0:
        return gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner))
    else:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def _up(
    x_ptr,
    weight_ptr,
    out_ptr,
    order_P,
    starts_E1,
    x_row,
    w_expert,
    w_row,
    width,
    inner,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    first, end = tl.load(starts_E1 + expert), tl.load(starts_E1 + expert + 1)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    i_N = tl.program_id(0) * COLS + tl.arange(0, COLS)
    real_N = i_N < inner
    gate_ptr = weight_ptr + expert.to(tl.int64) * w_expert
    up_ptr = gate_ptr + inner.to(tl.int64) * w_row
    c_D = tl.arange(0, DEPTH)
    at_DN = i_N[None, :].to(tl.int64) * w_row + c_D[:, None]
    for row in range(first, end, ROWS):
        r_R = row + tl.arange(0, ROWS)
        token_R = tl.load(order_P + r_R, mask=r_R < end, other=0).to(tl.int64) // EACH
        at_RD = token_R[:, None] * x_row + c_D[None, :]
        gate_RN = tl.zeros([ROWS, COLS], tl.float32)
        up_RN = tl.zeros([ROWS, COLS], tl.float32)
        for c in range(0, width, DEPTH):
            real_D = c + c_D < width
            x_RD = tl.load(x_ptr + at_RD + c, mask=(r_R < end)[:, None] & real_D, other=0.0)
            seen_DN = real_D[:, None] & real_N[None, :]
            gate_DN = tl.load(gate_ptr + at_DN + c, mask=seen_DN, other=0.0)
            gate_RN = tl.dot(x_RD, gate_DN, gate_RN, input_precision=PRECISION)
            up_DN = tl.load(up_ptr + at_DN + c, mask=seen_DN, other=0.0)
            up_RN = tl.dot(x_RD, up_DN, up_RN, input_precision=PRECISION)
        gate_RN = _activated(gate_RN.to(kind).to(tl.float32), KIND)
        out_RN = gate_RN.to(kind).to(tl.float32) * up_RN.to(kind).to(tl.float32)
        out_at = r_R[:, None].to(tl.int64) * inner + i_N[None, :]
        tl.store(out_ptr + out_at, out_RN.to(kind), mask=(r_R < end)[:, None] & real_N[None, :])


@triton.jit
def _down(
    h_ptr,
    weight_ptr,
    scores_P,
    out_ptr,
    order_P,
    starts_E1,
    w_expert,
    w_row,
    inner,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    first, end = tl.load(starts_E1 + expert), tl.load(starts_E1 + expert + 1)
    kind: tl.constexpr = h_ptr.dtype.element_ty
    c_N = tl.program_id(0) * COLS + tl.arange(0, COLS)
    real_N = c_N < width
    expert_ptr = weight_ptr + expert.to(tl.int64) * w_expert
    i_D = tl.arange(0, DEPTH)
    at_DN = c_N[None, :].to(tl.int64) * w_row + i_D[:, None]
    for row in range(first, end, ROWS):
        r_R = row + tl.arange(0, ROWS)
        pair_R = tl.load(order_P + r_R, mask=r_R < end, other=0)
        at_RD = r_R[:, None].to(tl.int64) * inner + i_D[None, :]
        out_RN = tl.zeros([ROWS, COLS], tl.float32)
        for i in range(0, inner, DEPTH):
            real_D = i + i_D < inner
            h_RD = tl.load(h_ptr + at_RD + i, mask=(r_R < end)[:, None] & real_D, other=0.0)
            seen_DN = real_D[:, None] & real_N[None, :]
            w_DN = tl.load(expert_ptr + at_DN + i, mask=seen_DN, other=0.0)
            out_RN = tl.dot(h_RD, w_DN, out_RN, input_precision=PRECISION)
        score_R = tl.load(scores_P + pair_R, mask=r_R < end, other=0.0).to(tl.float32)
        out_RN = out_RN.to(kind).to(tl.float32) * score_R[:, None]
        out_at = pair_R[:, None].to(tl.int64) * width + c_N[None, :]
        tl.store(out_ptr + out_at, out_RN, mask=(r_R < end)[:, None] & real_N[None, :])


@triton.jit
def _join(parts_PC, out_TC, width, EACH: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sum_W = tl.zeros([WIDTH], tl.float32)
    for each in range(EACH):
        sum_W += tl.load(
            parts_PC + (token * EACH + each) * width + c_W, mask=c_W < width, other=0.0
        )
    tl.store(out_TC + token * width + c_W, sum_W.to(out_TC.dtype.element_ty), mask=c_W < width)


def experts(
    x_TC: torch.Tensor,
    experts_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    gate_up_E2IC: torch.Tensor,
    down_ECI: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """[T, C]: sum of score * down(act(gate x) * up x) over each token's experts.

    `gate_up` holds each expert's gate rows, then its up rows; `kind` is one of `KINDS`. Partial
    results are rounded to the weights' dtype, as in products of their own; sums are float32.
    """
    count, width = x_TC.shape
    num_experts, _, inner = down_ECI.shape
    each = experts_TK.shape[1]
    pairs = count * each
    order_P = torch.empty(pairs, dtype=torch.int32, device=x_TC.device)
    starts_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=x_TC.device)
    ids_P = experts_TK.reshape(-1)
    _order[(num_experts,)](ids_P, order_P, starts_E1, pairs, WIDTH=_ORDER_WIDTH, num_warps=4)
    mode = precision(x_TC.dtype)
    inner_PI = x_TC.new_empty(pairs, inner)
    tile = _tile(pairs / num_experts, width, x_TC)
    _up[(triton.cdiv(inner, tile.cols), num_experts)](
        x_TC,
        gate_up_E2IC,
        inner_PI,
        order_P,
        starts_E1,
        x_TC.stride(0),
        gate_up_E2IC.stride(0),
        gate_up_E2IC.stride(1),
        width,
        inner,
        EACH=each,
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        KIND=KINDS[kind],
        PRECISION=mode,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    parts_PC = x_TC.new_empty(pairs, width, dtype=torch.float32)
    tile = _tile(pairs / num_experts, inner, x_TC)
    _down[(triton.cdiv(width, tile.cols), num_experts)](
        inner_PI,
        down_ECI,
        scores_TK.reshape(-1),
        parts_PC,
        order_P,
        starts_E1,
        down_ECI.stride(0),
        down_ECI.stride(1),
        inner,
        width,
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        PRECISION=mode,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    out_TC = torch.empty_like(x_TC)
    grid = (count, triton.cdiv(width, 1024))
    _join[grid](parts_PC, out_TC, width, EACH=each, WIDTH=1024, num_warps=4)
    return out_TC


def _tile(rows_each: float, depth: int, x: torch.Tensor) -> Tile:
    """For so many rows of an expert on average: most experts' rows fit into one turn."""
    return Tile(
        rows=min(64, power_of_two(int(1.5 * rows_each) + 1, 16)),
        cols=64,
        depth=min(_DEPTH_BYTES // x.element_size(), power_of_two(depth, 16)),
        num_warps=4,
        num_stages=_stages(x.device),
    )


@functools.cache
def _stages(device: torch.device) -> int:
    """Tiles of weights under way at once: as many as a processor's memory holds."""
    if device.type != "cuda":
        return 2
    facts: object = torch.cuda.get_device_properties(device)
    held: int = getattr(facts, "shared_memory_per_block_optin", 0)
    return 3 if held >= _THREE_STAGES_BYTES else 2
