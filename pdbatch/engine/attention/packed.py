"""Chunks that attend to nothing but themselves, from the projections: FlashAttention and cuDNN."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from pdbatch.engine.attention.tables import Run

Fused = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Run, float, int | None], torch.Tensor]


def takes_packed(device: torch.device, head_dim: int) -> bool:
    """Whether FlashAttention 2 is to take chunks without a prefix that are no equal prompts.

    On an H100 the paged kernel takes 0.8 to 0.95 of its time (16,384 tokens in prompts of 64 to
    4,096, heads of 128).
    """
    if device.type != "cuda" or head_dim > 128:
        return True
    return torch.cuda.get_device_capability(device) < (9, 0)


def serves(q_THD: torch.Tensor, softcap: float | None) -> bool:
    """Whether FlashAttention takes these heads."""
    size = q_THD.shape[2]
    halves = q_THD.dtype in (torch.float16, torch.bfloat16)
    return q_THD.is_cuda and halves and softcap is None and size <= 256 and size % 8 == 0


@functools.cache
def fused() -> Fused | None:
    """torch's attention over packed sequences, where this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    shares_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        run: Run,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        if run.equal is not None and window is None:
            taken = run.equal.attend(q_THD, k_THD, v_THD, run.longest, scaling)
            if taken is not None:
                return taken
        more: dict[str, Any] = {"scale": scaling}
        more["window_size"] = (-1 if window is None else window - 1, 0)
        if shares_heads:
            more["enable_gqa"] = q_THD.shape[1] != k_THD.shape[1]
        offsets, longest = run.cu_seqlens, run.longest
        out = varlen_attn(q_THD, k_THD, v_THD, offsets, offsets, longest, longest, **more)
        assert isinstance(out, torch.Tensor)
        return out

    return attend
