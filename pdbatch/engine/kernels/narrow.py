"""Products with weights of 8 or 4 bits that are widened in registers.

Up to some dozens of rows a product costs what reading its weights costs, so they are read as they
are kept (`pdbatch.engine.quantization.packed` says how) and become numbers on the way to the
tensor cores. One program has some outputs and a share of the inputs; of the programs with the same
outputs the last to finish adds all shares up, always in the same order. What a row gives depends on
neither the other rows nor on which program came last.

Legend: M rows, N outputs, K inputs, S slabs of 128 inputs, B bytes of a slab, P shares.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next
from pdbatch.engine.kernels.widening import SLAB, scale_and_addend, widened_4, widened_8
from pdbatch.engine.quantization.cuts import Tiles


@triton.jit
def _dot(x_MK, w_NK, acc, SWAP: tl.constexpr):
    """With SWAP [N, M], else [M, N]."""
    if SWAP:
        return tl.dot(w_NK, tl.trans(x_MK), acc)
    else:
        return tl.dot(x_MK, tl.trans(w_NK), acc)


@triton.jit
def _scaled(acc, scale_N, SWAP: tl.constexpr):
    if SWAP:
        return acc * scale_N[:, None]
    else:
        return acc * scale_N[None, :]


@triton.jit
def _summed(part_MN_ptr, part, shares, seen_MN):
    """All shares, in their order. Others wrote them meanwhile: past the first cache."""
    out_MN = tl.load(part_MN_ptr, mask=seen_MN, other=0.0, cache_modifier=".cg")
    for share in range(1, shares):
        share_MN_ptr = part_MN_ptr + share * part
        out_MN += tl.load(share_MN_ptr, mask=seen_MN, other=0.0, cache_modifier=".cg")
    return out_MN


@triton.jit(do_not_specialize=["count_M", "slabs", "shares"])
def _product(
    x_ptr,
    q_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    share_ptr,
    arrived_ptr,
    count_M,
    count_N,
    count_K,
    slabs,
    shares,
    x_row,
    out_row,
    alpha,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    BYTES: tl.constexpr = SLAB * BITS // 8
    tile_N, share, tile_M = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_N = tile_N * OUTPUTS + tl.arange(0, OUTPUTS)
    m_M = tile_M * ROWS + tl.arange(0, ROWS)
    real_N, real_M = n_N < count_N, m_M < count_M
    b_B = tl.arange(0, BYTES)
    q_NB_ptr = q_ptr + n_N[:, None] * BYTES + b_B[None, :]
    x_MB_ptr = x_ptr + m_M[:, None].to(tl.int64) * x_row + b_B[None, :]
    acc = tl.zeros([OUTPUTS, ROWS] if SWAP else [ROWS, OUTPUTS], tl.float32)
    wide = tl.full([], 0, tl.int64) + count_N
    first, last = share * slabs // shares, (share + 1) * slabs // shares
    for slab in tl.range(first, last, num_stages=STAGES):
        at = slab * wide
        if WHOLE:
            q_NB = tl.load(q_NB_ptr + at * BYTES)
        else:
            q_NB = tl.load(q_NB_ptr + at * BYTES, mask=real_N[:, None], other=0)
        begin = slab * SLAB
        seen_MB = real_M[:, None] & (begin + b_B < count_K)[None, :]
        if WHOLE:
            seen_MB = tl.broadcast_to(real_M[:, None], seen_MB.shape)
        x_MB = tl.load(x_MB_ptr + begin, mask=seen_MB, other=0.0)
        if BITS == 8:
            acc = _dot(x_MB, widened_8(q_NB, ASM), acc, SWAP)
        else:
            words_N = tl.load(scale_ptr + at + n_N, mask=real_N, other=0)
            scale_N, addend_N = scale_and_addend(words_N)
            first_NB, second_NB = widened_4(q_NB, addend_N, ASM)
            if not WHOLE:
                seen_MB = real_M[:, None] & (begin + BYTES + b_B < count_K)[None, :]
            others_MB = tl.load(x_MB_ptr + begin + BYTES, mask=seen_MB, other=0.0)
            group = _dot(x_MB, first_NB, tl.zeros_like(acc), SWAP)
            group = _dot(others_MB, second_NB, group, SWAP)
            acc += _scaled(group, scale_N, SWAP)
    let_next(DEPENDENT)
    if BITS == 8:
        acc = _scaled(acc, tl.load(scale_ptr + n_N, mask=real_N, other=0.0), SWAP)
    out_MN = tl.trans(acc) if SWAP else acc
    seen_MN = real_M[:, None] & real_N[None, :]
    is_last = not SHARED
    if SHARED:
        part_MN_ptr = share_ptr + m_M[:, None] * wide + n_N[None, :]
        part = count_M * wide
        tl.store(part_MN_ptr + share * part, out_MN, mask=seen_MN)
        arrived = arrived_ptr + tile_M * tl.num_programs(0) + tile_N
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == shares - 1
        if is_last:
            tl.debug_barrier()
            out_MN = _summed(part_MN_ptr, part, shares, seen_MN)
            tl.atomic_xchg(arrived, 0, sem="relaxed")
    if is_last:
        out_MN_ptr = out_ptr + m_M[:, None].to(tl.int64) * out_row + n_N[None, :]
        if BIASED:
            out_MN += tl.load(bias_ptr + n_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
        if ADDED:
            old_MN = tl.load(out_MN_ptr, mask=seen_MN, other=0.0).to(tl.float32)
            out_MN = old_MN + alpha * out_MN
        tl.store(out_MN_ptr, out_MN.to(out_ptr.dtype.element_ty), mask=seen_MN)


def product(
    x_MK: torch.Tensor,
    q_SNB: torch.Tensor,
    scales: torch.Tensor,
    out_MN: torch.Tensor,
    tiles: Tiles,
    arrived: torch.Tensor,
    *,
    bias_N: torch.Tensor | None = None,
    alpha: float | None = None,
) -> None:
    """out = x @ w.T + bias; with `alpha`, out += alpha * (that).

    `q_SNB` and `scales` are as `quantization.packed` makes them. `arrived` has an int32 for each
    tile of the output, zero before and after; products at the same time must not share it.
    x is bfloat16 with its inputs one beside the other.
    """
    rows, inputs = x_MK.shape
    slabs, outputs, width = q_SNB.shape
    shares = min(tiles.shares, slabs)
    grid = (triton.cdiv(outputs, tiles.outputs), shares, triton.cdiv(rows, tiles.rows))
    parts = out_MN if shares == 1 else x_MK.new_empty(shares, rows, outputs, dtype=torch.float32)
    _product[grid](
        x_MK,
        q_SNB,
        scales,
        out_MN if bias_N is None else bias_N,
        out_MN,
        parts,
        arrived,
        rows,
        outputs,
        inputs,
        slabs,
        shares,
        x_MK.stride(0),
        out_MN.stride(0),
        1.0 if alpha is None else alpha,
        BITS=width // 16,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        ADDED=alpha is not None,
        BIASED=bias_N is not None,
        WHOLE=inputs % 128 == 0 and outputs % tiles.outputs == 0,
        SHARED=shares > 1,
        SWAP=tiles.swap,
        STAGES=tiles.stages,
        ASM=x_MK.is_cuda,
        num_warps=tiles.warps,
        **dependent(x_MK.device),
    )
