"""Root-mean-square norms, alone or added to a residual: one program a row."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next
from pdbatch.engine.kernels.scores import power_of_two

FIRST, LAST, SHIFTED = 0, 1, 2
"""Where a model rounds: before the weight, after it, or after a weight that counts from 1."""


@triton.jit
def _norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    residual_ptr,
    x_row,
    out_row,
    residual_row,
    size,
    eps,
    WIDTH: tl.constexpr,
    STYLE: tl.constexpr,
    ADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    c_C = tl.arange(0, WIDTH)
    real_C = c_C < size
    kind: tl.constexpr = x_ptr.dtype.element_ty
    x_C = tl.load(x_ptr + row * x_row + c_C, mask=real_C, other=0.0).to(tl.float32)
    weight_C = tl.load(weight_ptr + c_C, mask=real_C, other=0.0).to(tl.float32)
    x_C = x_C * tl.rsqrt(tl.sum(x_C * x_C, 0) / size + eps)
    if STYLE == 0:
        out_C = (x_C.to(kind).to(tl.float32) * weight_C).to(kind)
    elif STYLE == 1:
        out_C = (x_C * weight_C).to(kind)
    else:
        out_C = (x_C * (1.0 + weight_C)).to(kind)
    if ADDED:
        old_C = tl.load(residual_ptr + row * residual_row + c_C, mask=real_C, other=0.0)
        out_C = (old_C.to(tl.float32) + out_C.to(tl.float32)).to(kind)
    let_next(DEPENDENT)
    tl.store(out_ptr + row * out_row + c_C, out_C, mask=real_C)


def norm(
    x: torch.Tensor,
    weight_C: torch.Tensor,
    eps: float,
    style: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norm of the last dimension; with `residual`, that plus the norm, written into it."""
    flat_TC = x.reshape(-1, x.shape[-1])
    if residual is None:
        out, out_TC = torch.empty_like(x, memory_format=torch.contiguous_format), None
    else:
        out, out_TC = residual, residual.view(-1, x.shape[-1])
    out_TC = out.view(-1, x.shape[-1]) if out_TC is None else out_TC
    width = power_of_two(x.shape[-1])
    _norm[(flat_TC.shape[0],)](
        flat_TC,
        weight_C,
        out_TC,
        out_TC,
        flat_TC.stride(0),
        out_TC.stride(0),
        out_TC.stride(0),
        x.shape[-1],
        eps,
        WIDTH=width,
        STYLE=style,
        ADDED=residual is not None,
        num_warps=min(16, max(1, width // 512)),
        **dependent(x.device),
    )
    return out
