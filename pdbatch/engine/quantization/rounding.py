"""Weights rounded to whole numbers of 8 or 4 bits, without data.

    wint8   w ≈ scale * q             a scale for each output, q in -127..127
    wint4   w ≈ scale * (q - zero)    scale and zero for each output and 128 inputs, q in 0..15

The range of a scale is that of its weights, with 0 in it. (Ranges cut so that the squared error is
least gave no better perplexity: benchmarks/NOTES.md.)

Legend: N outputs, K inputs, S slabs of 128 inputs (the last one padded with zeros).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SLAB = 128
"""Inputs that share a scale in wint4, and that a kernel takes at a time."""
_ROWS_AT_ONCE = 2048
_TINY = 1e-30


class Rounded(NamedTuple):
    """Whole numbers and what they stand for."""

    q_NSK: torch.Tensor
    """[N, S, 128]: int8 (wint8) or uint8 (wint4)."""
    scale: torch.Tensor
    """[N, 1] float32 (wint8) or [N, S] bfloat16 (wint4)."""
    zero_NS: torch.Tensor | None
    """uint8; None for wint8, whose zero is 0."""

    def numbers(self, inputs: int) -> torch.Tensor:
        """[N, inputs] in float32: what the weights have become."""
        q_NSK = self.q_NSK.float()
        if self.zero_NS is not None:
            q_NSK = q_NSK - self.zero_NS[..., None]
        return (q_NSK * self.scale.float()[..., None]).flatten(1)[:, :inputs].contiguous()


def rounded(weight_NK: torch.Tensor, bits: int) -> Rounded:
    """The nearest numbers of 8 or 4 bits; a bounded number of rows at a time is in float32."""
    some = _four if bits == 4 else _eight
    starts = range(0, weight_NK.shape[0], _ROWS_AT_ONCE)
    parts = [some(_slabs(weight_NK[at : at + _ROWS_AT_ONCE])) for at in starts]
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_NS for part in parts if part.zero_NS is not None]
    return Rounded(
        torch.cat([part.q_NSK for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _slabs(weight_NK: torch.Tensor) -> torch.Tensor:
    """[N, S, 128] in float32."""
    padded = torch.nn.functional.pad(weight_NK.float(), (0, -weight_NK.shape[1] % SLAB))
    return padded.view(padded.shape[0], -1, SLAB)


def _eight(w_NSK: torch.Tensor) -> Rounded:
    most_N1 = w_NSK.abs().amax((1, 2)).clamp_min(_TINY)[:, None]
    scale_N1 = most_N1 / 127
    return Rounded((w_NSK / scale_N1[..., None]).round_().to(torch.int8), scale_N1, None)


def _four(w_NSK: torch.Tensor) -> Rounded:
    low_NS, high_NS = w_NSK.amin(2).clamp_max(0), w_NSK.amax(2).clamp_min(0)
    scale_NS = ((high_NS - low_NS) / 15).clamp_min(_TINY).bfloat16()
    wide_NS = scale_NS.float()
    zero_NS = (low_NS / -wide_NS).round_().clamp_(0, 15)
    q_NSK = (w_NSK / wide_NS[..., None]).round_().add_(zero_NS[..., None]).clamp_(0, 15)
    return Rounded(q_NSK.byte(), scale_NS, zero_NS.byte())
