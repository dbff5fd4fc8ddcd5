"""The gated activation between a merged gate-and-up product and the one after it."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next

KINDS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}
"""Activations that have a kernel."""
_WIDTH = 1024


@triton.jit
def _gated(
    x_ptr,
    out_ptr,
    x_row,
    out_row,
    size,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real_C = c_C < size
    kind: tl.constexpr = x_ptr.dtype.element_ty
    gate_C = tl.load(x_ptr + row * x_row + c_C, mask=real_C, other=0.0).to(tl.float32)
    up_C = tl.load(x_ptr + row * x_row + size + c_C, mask=real_C, other=0.0).to(tl.float32)
    if KIND == 0:
        gate_C = gate_C / (1.0 + tl.exp(-gate_C))
    elif KIND == 1:
        inner_C = 0.7978845608028654 * (gate_C + 0.044715 * gate_C * gate_C * gate_C)
        gate_C = gate_C / (1.0 + tl.exp(-2.0 * inner_C))
    else:
        gate_C = 0.5 * gate_C * (1.0 + tl.erf(gate_C * 0.7071067811865476))
    let_next(DEPENDENT)
    out_C = gate_C.to(kind).to(tl.float32) * up_C
    tl.store(out_ptr + row * out_row + c_C, out_C.to(kind), mask=real_C)


def gated(x: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up for `x` = [..., gate then up]; `kind` is one of `KINDS`."""
    flat_TX = x.view(-1, x.shape[-1])
    size = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    _gated[(flat_TX.shape[0], triton.cdiv(size, _WIDTH))](
        flat_TX,
        out,
        flat_TX.stride(0),
        size,
        size,
        WIDTH=_WIDTH,
        KIND=KINDS[kind],
        num_warps=4,
        **dependent(x.device),
    )
    return out
