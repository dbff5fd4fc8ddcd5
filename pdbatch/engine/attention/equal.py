"""Prompts of one length, attended to as a plain batch by cuDNN, which knows no packed sequences.

On Hopper cuDNN's attention takes half the time of FlashAttention 2 (16 prompts of 1,024 tokens of
Llama-3-8B's shape: 0.29 against 0.60 ms), but each new shape of a batch costs it tens of
milliseconds. So stretches of equal prompts are cut into powers of two, and only a shape that keeps
coming back is given to it.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdbatch.engine.memory import is_shortage

logger = logging.getLogger(__name__)

_OFTEN = 3
"""Steps that had a shape before it is worth a plan of its own."""
LEAST_TOKENS = 256
LEAST_PROMPTS = 4
_MOST_SHAPES = 256


class EqualPrompts:
    """Which stretches of a step are taken as batches. One for each runner."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[int, int]] = Counter()
        self._broken = False

    def cut(self, lens: list[int]) -> list[tuple[int, bool]]:
        """Pieces of neighbouring prompts of these lengths: (how many, whether as a batch)."""
        pieces: list[tuple[int, bool]] = []
        at = 0
        while at < len(lens):
            equal = at + 1
            while equal < len(lens) and lens[equal] == lens[at]:
                equal += 1
            while equal - at >= LEAST_PROMPTS:
                count = 1 << (equal - at).bit_length() - 1
                _append(pieces, count, self._recurs(count, lens[at]))
                at += count
            _append(pieces, equal - at, False)
            at = equal
        return pieces

    def expect(self, count: int, length: int) -> None:
        """Take the next so many prompts of this length as a batch, though none came before."""
        self._seen[count, length] = _OFTEN

    def attend(
        self,
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        length: int,
        scaling: float,
    ) -> torch.Tensor | None:
        """Causal attention of prompts of `length` tokens each; [T, H, D]. None: cuDNN refused."""
        if self._broken:
            return None
        q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_THD, v_THD))
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                )
        except RuntimeError as error:
            if is_shortage(error):
                raise
            self._broken = True
            reason = str(error).splitlines()[0]
            logger.warning("equal prompts are attended to without cuDNN: %s", reason)
            return None
        return out.transpose(1, 2).reshape(q_THD.shape)

    def _recurs(self, count: int, length: int) -> bool:
        if self._broken or length < LEAST_TOKENS:
            return False
        if len(self._seen) >= _MOST_SHAPES and (count, length) not in self._seen:
            self._seen.clear()
        self._seen[count, length] += 1
        return self._seen[count, length] > _OFTEN


def serves(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether cuDNN's attention is the faster one here."""
    halves = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not halves or head_dim > 128 or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _append(pieces: list[tuple[int, bool]], count: int, batch: bool) -> None:
    """Add a piece; neighbours that are no batches are one."""
    if count and pieces and not batch and not pieces[-1][1]:
        count += pieces.pop()[0]
    if count:
        pieces.append((count, batch))
