"""Root-mean-square norms of all families in one module."""

from __future__ import annotations

import torch

FIRST, LAST, SHIFTED = STYLES = (0, 1, 2)
"""Rounded before the weight; after it; after a weight that counts from 1."""


class Norm(torch.nn.Module):
    """The norm of the last dimension."""

    def __init__(self, weight_C: torch.Tensor, eps: float, style: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_C, requires_grad=False)
        self.eps = eps
        self.style = style

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm; with a residual, both together, in the residual's memory on a GPU."""
        if x.is_cuda:
            from pdbatch.engine.kernels.norm import norm

            return norm(x, self.weight, self.eps, self.style, residual)
        out = normed(x, self.weight, self.eps, self.style)
        return out if residual is None else residual + out


def normed(x: torch.Tensor, weight_C: torch.Tensor, eps: float, style: int) -> torch.Tensor:
    """In plain torch, rounded as the families do."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if style == FIRST:
        return weight_C * wide.to(x.dtype)
    if style == LAST:
        return (weight_C * wide).to(x.dtype)
    return (wide * (1.0 + weight_C.float())).to(x.dtype)
