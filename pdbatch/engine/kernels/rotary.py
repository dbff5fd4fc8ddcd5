"""From the merged product of a layer to rotated heads and a written cache, in one pass.

The input is `[T, (query heads + 2 KV heads) * D]`: queries, keys, values. Queries are normed
(where the model norms heads) and rotated in place; keys likewise and written to their slots, in
place too only where somebody reads them there; values go to their slots as they are. Only the
first `R` numbers of a head turn, as two halves or as pairs of neighbours.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pdbatch.engine.kernels.dependent import after_previous, dependent, let_next
from pdbatch.engine.kernels.scores import power_of_two
from pdbatch.engine.kvcache import PagedKVCache

_MANY_TOKENS = 1024
"""Programs of more tokens each fill the device from here on."""


@triton.jit
def _weighted(x_TD, rms_T, weight_D, kind: tl.constexpr, SHIFTED: tl.constexpr):
    """The norm's last steps, rounded where the model rounds."""
    x_TD = x_TD * rms_T[:, None]
    if SHIFTED:
        return (x_TD * (1.0 + weight_D.to(tl.float32))[None, :]).to(kind).to(tl.float32)
    else:
        rounded_TD = x_TD.to(kind).to(tl.float32)
        return (rounded_TD * weight_D.to(tl.float32)[None, :]).to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _rotary(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm,
    k_norm,
    pool_ptr,
    slots,
    count,
    qkv_token,
    turn_token,
    block_stride,
    k_offset,
    v_offset,
    eps,
    Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    after_previous(DEPENDENT)
    head = tl.program_id(1)
    t_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real_T = t_T < count
    from_T = qkv_ptr + t_T.to(tl.int64) * qkv_token + head * D
    slot_T = tl.load(slots + t_T, mask=real_T, other=-1)
    at_T = (slot_T // BLOCK).to(tl.int64) * block_stride + (slot_T % BLOCK) * D
    if head >= Q_HEADS + HEADS:
        d_D = tl.arange(0, WIDTH)
        mask_TD = (slot_T >= 0)[:, None] & (d_D < D)[None, :]
        v_TD = tl.load(from_T[:, None] + d_D[None, :], mask=mask_TD)
        page = pool_ptr + v_offset + (head - Q_HEADS - HEADS) * (BLOCK * D)
        tl.store(page + at_T[:, None] + d_D[None, :], v_TD, mask=mask_TD)
        return
    kind: tl.constexpr = qkv_ptr.dtype.element_ty
    i_D = tl.arange(0, HALF)
    if PAIRS:
        a_D = 2 * i_D
        b_D = 2 * i_D + 1
    else:
        a_D = i_D
        b_D = i_D + R // 2
    turns_D = i_D < R // 2
    mask_TD = real_T[:, None] & turns_D[None, :]
    a_TD = tl.load(from_T[:, None] + a_D[None, :], mask=mask_TD, other=0.0).to(tl.float32)
    b_TD = tl.load(from_T[:, None] + b_D[None, :], mask=mask_TD, other=0.0).to(tl.float32)
    c_D = R + tl.arange(0, REST)
    rest_TD = real_T[:, None] & (c_D < D)[None, :]
    c_TD = tl.zeros([TOKENS, REST], tl.float32)
    if R < D:
        c_TD = tl.load(from_T[:, None] + c_D[None, :], mask=rest_TD, other=0.0).to(tl.float32)
    if NORMED:
        squares_T = tl.sum(a_TD * a_TD, 1) + tl.sum(b_TD * b_TD, 1)
        if R < D:
            squares_T += tl.sum(c_TD * c_TD, 1)
        rms_T = tl.rsqrt(squares_T / D + eps)
        norm = q_norm
        if head >= Q_HEADS:
            norm = k_norm
        a_TD = _weighted(a_TD, rms_T, tl.load(norm + a_D, mask=turns_D), kind, SHIFTED)
        b_TD = _weighted(b_TD, rms_T, tl.load(norm + b_D, mask=turns_D), kind, SHIFTED)
        if R < D:
            c_TD = _weighted(c_TD, rms_T, tl.load(norm + c_D, mask=c_D < D), kind, SHIFTED)
    turn_TD = t_T.to(tl.int64)[:, None] * turn_token + i_D[None, :]
    cos_TD = tl.load(cos_ptr + turn_TD, mask=mask_TD, other=0.0).to(tl.float32)
    sin_TD = tl.load(sin_ptr + turn_TD, mask=mask_TD, other=0.0).to(tl.float32)
    new_a_TD = (a_TD * cos_TD - b_TD * sin_TD).to(kind)
    new_b_TD = (b_TD * cos_TD + a_TD * sin_TD).to(kind)
    new_c_TD = c_TD.to(kind)
    if head >= Q_HEADS:
        page = pool_ptr + k_offset + (head - Q_HEADS) * (BLOCK * D)
        kept_T = slot_T >= 0
        kept_TD = kept_T[:, None] & turns_D[None, :]
        tl.store(page + at_T[:, None] + a_D[None, :], new_a_TD, mask=kept_TD)
        tl.store(page + at_T[:, None] + b_D[None, :], new_b_TD, mask=kept_TD)
        if R < D:
            kept_TD = kept_T[:, None] & (c_D < D)[None, :]
            tl.store(page + at_T[:, None] + c_D[None, :], new_c_TD, mask=kept_TD)
    let_next(DEPENDENT)
    if not KEEP_K:
        mask_TD = mask_TD & (head < Q_HEADS)
        rest_TD = rest_TD & (head < Q_HEADS)
    tl.store(from_T[:, None] + a_D[None, :], new_a_TD, mask=mask_TD)
    tl.store(from_T[:, None] + b_D[None, :], new_b_TD, mask=mask_TD)
    if NORMED and R < D:
        tl.store(from_T[:, None] + c_D[None, :], new_c_TD, mask=rest_TD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """How a model turns (and norms) its heads."""

    num_q_heads: int
    num_turning: int
    """Leading numbers of a head that turn."""
    pairs: bool
    """Neighbours turn together; otherwise number i of the first half with i of the second."""
    q_norm: torch.Tensor | None = None
    """[D], where every head is normed before it turns; then `k_norm` too."""
    k_norm: torch.Tensor | None = None
    eps: float = 0.0
    shifted: bool = False
    """The norm's weight counts from 1, and is applied before rounding."""


def rotary(
    qkv_TX: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    how: Turning,
    cache: PagedKVCache,
    layer: int,
    slots: torch.Tensor,
    *,
    keep_k: bool,
    tokens: int | None = None,
) -> None:
    """Turn in place and write. `cos` and `sin` are [T, R]; only their first half is read."""
    shape = cache.shape
    heads, size = shape.num_kv_heads, shape.head_dim
    count, page = qkv_TX.shape[0], shape.block_size * size
    layer_at = layer * 2 * heads * page
    tokens = tokens or (16 if count >= _MANY_TOKENS else 4)
    rest = size - how.num_turning
    _rotary[(triton.cdiv(count, tokens), how.num_q_heads + 2 * heads)](
        qkv_TX,
        cos_TR,
        sin_TR,
        how.q_norm if how.q_norm is not None else qkv_TX,
        how.k_norm if how.k_norm is not None else qkv_TX,
        cache.pool,
        slots,
        count,
        qkv_TX.stride(0),
        cos_TR.stride(0),
        cache.pool.stride(0),
        layer_at,
        layer_at + heads * page,
        how.eps,
        Q_HEADS=how.num_q_heads,
        HEADS=heads,
        D=size,
        R=how.num_turning,
        HALF=power_of_two(how.num_turning // 2),
        REST=power_of_two(rest, 2),
        WIDTH=power_of_two(size),
        BLOCK=shape.block_size,
        TOKENS=tokens,
        PAIRS=how.pairs,
        NORMED=how.q_norm is not None,
        SHIFTED=how.shifted,
        KEEP_K=keep_k,
        num_warps=4,
        **dependent(qkv_TX.device),
    )
