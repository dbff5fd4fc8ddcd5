"""Weights of 8 or 4 bits become numbers: in registers, on the way to a product, or in memory.

How they are kept is said in `pdbatch.engine.quantization.packed`. No conversion of integers is
used, which a multiprocessor does to 16 at a time, 8 times slower than anything here.

Legend: N outputs, K inputs, S slabs of 128 inputs, B bytes of a slab.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLAB: tl.constexpr = tl.constexpr(128)

# 4 bits: the byte's two nibbles become the last bits of the bfloat16 128 (0x4300), which is then
# 128 + q; the addend is -(128 + zero). All exact. One 32-bit word is four bytes.
_WIDEN_4: tl.constexpr = tl.constexpr("""
{
    .reg .b32 low, high, magic, one, a, b, c, d;
    mov.b32 magic, 0x43434343;
    mov.b32 one, 0x3F803F80;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 a, low, magic, 0x4140;
    prmt.b32 b, low, magic, 0x4342;
    prmt.b32 c, high, magic, 0x4140;
    prmt.b32 d, high, magic, 0x4342;
    fma.rn.bf16x2 $0, a, one, $5;
    fma.rn.bf16x2 $1, b, one, $6;
    fma.rn.bf16x2 $2, c, one, $5;
    fma.rn.bf16x2 $3, d, one, $6;
}
""")
# 8 bits, two's complement: 128 + the low seven bits, less 128 or (with the sign bit) 256.
_WIDEN_8: tl.constexpr = tl.constexpr("""
{
    .reg .b32 magic, minus, a, b, c, d;
    mov.b32 magic, 0x43434343;
    mov.b32 minus, 0xBF80BF80;
    prmt.b32 a, $2, magic, 0x4140;
    prmt.b32 b, $2, magic, 0x4342;
    and.b32 c, a, 0xFF80FF80;
    and.b32 d, b, 0xFF80FF80;
    and.b32 a, a, 0xFF7FFF7F;
    and.b32 b, b, 0xFF7FFF7F;
    fma.rn.bf16x2 $0, c, minus, a;
    fma.rn.bf16x2 $1, d, minus, b;
}
""")


@triton.jit
def widened_4(q_NB, addend_N, ASM: tl.constexpr):
    """Two [N, 64] of bfloat16, q - zero: the first 64 inputs of a slab, and the others."""
    if ASM:
        addend_NB = tl.broadcast_to(addend_N[:, None], q_NB.shape)
        return tl.inline_asm_elementwise(
            _WIDEN_4,
            "=r,=r,=r,=r,r,r,r",
            [q_NB, addend_NB],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        addend_N1 = addend_N.to(tl.float32)[:, None] + 128.0
        first_NB = (q_NB & 15).to(tl.float32) + addend_N1
        second_NB = (q_NB >> 4).to(tl.float32) + addend_N1
        return first_NB.to(tl.bfloat16), second_NB.to(tl.bfloat16)


@triton.jit
def widened_8(q_NB, ASM: tl.constexpr):
    """[N, 128] of bfloat16, whole numbers."""
    if ASM:
        return tl.inline_asm_elementwise(
            _WIDEN_8, "=r,=r,r", [q_NB], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return q_NB.to(tl.int8, bitcast=True).to(tl.float32).to(tl.bfloat16)


@triton.jit
def scale_and_addend(words_N):
    """Of 32-bit words: the scale in the high half, -(128 + zero) in the low one."""
    scale_N = (words_N & -65536).to(tl.float32, bitcast=True)
    addend_N = (words_N & 65535).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return scale_N, addend_N


@triton.jit(do_not_specialize=["first_N", "last_N"])
def _widen(
    q_ptr,
    scale_ptr,
    out_ptr,
    first_N,
    last_N,
    count_N,
    count_K,
    BITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ASM: tl.constexpr,
):
    BYTES: tl.constexpr = SLAB * BITS // 8
    slab = tl.program_id(0)
    n_N = first_N + tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real_N = n_N < last_N
    b_B = tl.arange(0, BYTES)
    at = slab.to(tl.int64) * count_N
    q_ptr += at * BYTES
    q_NB = tl.load(q_ptr + n_N[:, None] * BYTES + b_B[None, :], mask=real_N[:, None], other=0)
    k_B = slab * SLAB + b_B
    out_NB_ptr = out_ptr + (n_N - first_N)[:, None].to(tl.int64) * count_K + k_B[None, :]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if BITS == 8:
        scale_N = tl.load(scale_ptr + n_N, mask=real_N, other=0.0)
        out_NB = (widened_8(q_NB, ASM).to(tl.float32) * scale_N[:, None]).to(kind)
        tl.store(out_NB_ptr, out_NB, mask=real_N[:, None] & (k_B < count_K)[None, :])
    else:
        scale_N, addend_N = scale_and_addend(tl.load(scale_ptr + at + n_N, mask=real_N, other=0))
        first_NB, second_NB = widened_4(q_NB, addend_N, ASM)
        first_NB = (first_NB.to(tl.float32) * scale_N[:, None]).to(kind)
        second_NB = (second_NB.to(tl.float32) * scale_N[:, None]).to(kind)
        tl.store(out_NB_ptr, first_NB, mask=real_N[:, None] & (k_B < count_K)[None, :])
        k_B += BYTES
        tl.store(out_NB_ptr + BYTES, second_NB, mask=real_N[:, None] & (k_B < count_K)[None, :])


def widen(q_SNB: torch.Tensor, scales: torch.Tensor, out_NK: torch.Tensor, first: int = 0) -> None:
    """The weight's rows from `first` on, as many as `out_NK` has, as numbers of its dtype."""
    slabs, outputs, width = q_SNB.shape
    _widen[(slabs, triton.cdiv(out_NK.shape[0], 64))](
        q_SNB,
        scales,
        out_NK,
        first,
        first + out_NK.shape[0],
        outputs,
        out_NK.shape[1],
        BITS=width // 16,
        OUTPUTS=64,
        ASM=q_SNB.is_cuda,
        num_warps=4,
    )
