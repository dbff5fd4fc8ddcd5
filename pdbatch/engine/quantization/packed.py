"""How rounded weights lie in memory for the kernels of `pdbatch.engine.kernels.narrow`.

Slab by slab (128 inputs), in a slab output by output, so that what a program reads at a time is one
piece of some kilobytes. A slab's bytes of one output:

    wint8   byte b is q of input b, two's complement
    wint4   byte b is q of input b in the low half, of input 64 + b in the high one

wint8 has a float32 scale for each output. wint4 has a word of 32 bits for each slab and output: the
scale's bfloat16 in the high half, that of -(128 + zero) in the low one, which is what the kernel
adds to the bfloat16 128 + q.
"""

from __future__ import annotations

import torch

from pdbatch.engine.quantization.rounding import SLAB, Rounded


def pack(rounded: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes [S, N, 128 or 64] (uint8), and the scales [N] (float32) or words [S, N] (int32)."""
    q_SNK = rounded.q_NSK.transpose(0, 1)
    if rounded.zero_NS is None:
        return q_SNK.contiguous().view(torch.uint8), rounded.scale[:, 0].contiguous()
    half = SLAB // 2
    q_SNB = q_SNK[..., :half] | (q_SNK[..., half:] << 4)
    addend_NS = -(128.0 + rounded.zero_NS.float()).bfloat16()
    words_NS = _bits(rounded.scale) << 16 | (_bits(addend_NS) & 0xFFFF)
    return q_SNB.contiguous(), words_NS.t().contiguous()


def unpack(q_SNB: torch.Tensor, scales: torch.Tensor) -> Rounded:
    """What `pack` was given."""
    if q_SNB.shape[-1] == SLAB:
        return Rounded(q_SNB.view(torch.int8).transpose(0, 1), scales[:, None], None)
    q_SNK = torch.cat([q_SNB & 15, q_SNB >> 4], -1)
    words_NS = scales.t()
    scale_NS = (words_NS & -65536).contiguous().view(torch.float32).bfloat16()
    addend_NS = (words_NS << 16).contiguous().view(torch.float32)
    return Rounded(q_SNK.transpose(0, 1), scale_NS, (-128.0 - addend_NS).byte())


def _bits(x: torch.Tensor) -> torch.Tensor:
    """A bfloat16's 16 bits, as an int32 of either sign."""
    return x.contiguous().view(torch.int16).int()
