"""Modules of a rank: they hold a part and give what the whole would give.

Legend: T tokens, C the model's width, P this rank's part of an inner width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pdbatch.engine.merged.norm import FIRST, LAST, Norm
from pdbatch.engine.parallel.group import Group
from pdbatch.engine.quantization.linear import QuantizedLinear


class SummedLinear(torch.nn.Module):
    """A product whose input is shared among the ranks; the bias is added once."""

    def __init__(self, group: Group, weight_CP: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(weight_CP, requires_grad=False)
        self.narrow: QuantizedLinear | None = None
        self.bias = None
        if bias_C is not None:
            self.bias = torch.nn.Parameter(bias_C, requires_grad=False)
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., P] to [..., C], the same on every rank."""
        part = F.linear(x, self.weight) if self.narrow is None else self.narrow(x)
        out = self._group.sum_(part)
        return out if self.bias is None else out.add_(self.bias)

    def quantize(self, bits: int) -> bool:
        """Round this rank's part of the weight, which goes; False where that was done before."""
        if self.narrow is not None:
            return False
        self.narrow, self.weight = QuantizedLinear(self.weight, None, bits), None
        return True


class Summed(torch.nn.Module):
    """A module that gives a partial sum on each rank (experts)."""

    def __init__(self, group: Group, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, the same on every rank."""
        out: torch.Tensor = self.inner(x).contiguous()
        return self._group.sum_(out)


class SharedNorm(Norm):
    """The norm of all heads together, of which this rank has some."""

    def __init__(self, group: Group, weight_P: torch.Tensor, eps: float, style: int) -> None:
        super().__init__(weight_P, eps, style)
        self._group = group

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """As `Norm.forward` over the parts of all ranks."""
        wide = x.float()
        squares = self._group.sum_(wide.pow(2).sum(-1, keepdim=True))
        wide = wide * torch.rsqrt(squares / (x.shape[-1] * self._group.size) + self.eps)
        if self.style == FIRST:
            out = self.weight * wide.to(x.dtype)
        elif self.style == LAST:
            out = (self.weight * wide).to(x.dtype)
        else:
            out = (wide * (1.0 + self.weight.float())).to(x.dtype)
        return out if residual is None else residual + out


class SharedHead(torch.nn.Module):
    """The language head: each rank has some rows, and gathers all logits."""

    def __init__(
        self,
        group: Group,
        weight_PC: torch.Tensor,
        bias_P: torch.Tensor | None,
        vocab_size: int,
    ) -> None:
        """P is the same on every rank: the last one's rows are padded."""
        super().__init__()
        self.weight: Any = torch.nn.Parameter(weight_PC, requires_grad=False)
        self.narrow: QuantizedLinear | None = None
        self.bias = None
        if bias_P is not None:
            self.bias = torch.nn.Parameter(bias_P, requires_grad=False)
        self._group = group
        self._vocab_size = vocab_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] to [..., V], the same on every rank."""
        narrow = self.narrow
        part = F.linear(x, self.weight, self.bias) if narrow is None else narrow(x)
        parts = self._group.gather(part)
        return parts.movedim(0, -2).flatten(-2)[..., : self._vocab_size]

    def quantize(self, bits: int) -> bool:
        """Round this rank's part of the weight, which goes; False where that was done before."""
        if self.narrow is not None:
            return False
        self.narrow, self.weight = QuantizedLinear(self.weight, self.bias, bits), None
        return True
