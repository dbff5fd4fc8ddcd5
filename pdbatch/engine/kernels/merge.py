"""Joins the partial results of one sequence by their log-sum-exp.

A row's parts are [row_parts[row], row_parts[row + 1]) and, where it begins with a shared prefix,
`splits` parts more from place `shared_at[row]` on. A row without parts stands in the output
already and is left alone.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next
from pdbatch.engine.kernels.scores import power_of_two


@triton.jit
def _join(part_out, part_lse, part, best_R, sum_R, out_RD, real_RD, g_R, d_D, D: tl.constexpr):
    at_R = part + g_R
    lse_R = tl.load(part_lse + at_R, mask=real_RD, other=float("-inf"))
    part_RD = tl.load(
        part_out + at_R[:, None] * D + d_D[None, :],
        mask=real_RD[:, None] & (d_D < D)[None, :],
        other=0.0,
    )
    new_R = tl.maximum(best_R, lse_R)
    safe_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    decay_R = tl.exp2(best_R - safe_R)
    weight_R = tl.exp2(lse_R - safe_R)
    sum_R = sum_R * decay_R + weight_R
    out_RD = out_RD * decay_R[:, None] + part_RD * weight_R[:, None]
    return new_R, sum_R, out_RD


@triton.jit(do_not_specialize=["splits"])
def _merge(
    part_out,
    part_lse,
    row_parts,
    shared_at,
    out_ptr,
    out_token,
    out_head,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(row_parts + row)
    last = tl.load(row_parts + row + 1)
    shared = -1
    if SHARED:
        shared = tl.load(shared_at + row)
    if last == first:
        return
    g_R = tl.arange(0, ROWS)
    d_D = tl.arange(0, WIDTH)
    real_R = g_R < GROUP
    best_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RD = tl.zeros([ROWS, WIDTH], tl.float32)
    for own in range(first, last):
        part = (own * HEADS + head) * GROUP
        best_R, sum_R, out_RD = _join(
            part_out, part_lse, part, best_R, sum_R, out_RD, real_R, g_R, d_D, D
        )
    if SHARED:  # noqa: SIM102  (one is known when the kernel is compiled)
        if shared >= 0:
            for split in range(0, splits):
                part = ((shared + split) * HEADS + head) * GROUP
                best_R, sum_R, out_RD = _join(
                    part_out, part_lse, part, best_R, sum_R, out_RD, real_R, g_R, d_D, D
                )
    let_next(DEPENDENT)
    out_RD = out_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    tl.store(
        out_ptr + row * out_token + (head * GROUP + g_R)[:, None] * out_head + d_D[None, :],
        out_RD.to(out_ptr.dtype.element_ty),
        mask=real_R[:, None] & (d_D < D)[None, :],
    )


def merge(
    out_THD: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    row_parts: torch.Tensor,
    shared_at: torch.Tensor,
    rows: int,
    num_kv_heads: int,
    splits: int,
) -> None:
    """Finish rows [0, rows) of `out_THD`. `splits` 0: no row has a shared prefix."""
    group, size = out_THD.shape[1] // num_kv_heads, out_THD.shape[2]
    _merge[(rows, num_kv_heads)](
        part_out,
        part_lse,
        row_parts,
        shared_at,
        out_THD,
        out_THD.stride(0),
        out_THD.stride(1),
        splits,
        HEADS=num_kv_heads,
        GROUP=group,
        ROWS=power_of_two(group),
        D=size,
        WIDTH=power_of_two(size, 16),
        SHARED=splits > 0,
        num_warps=2,
        **dependent(out_THD.device),
    )
