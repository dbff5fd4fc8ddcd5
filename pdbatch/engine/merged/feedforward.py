"""The gated feed-forward of a layer with gate and up in one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pdbatch.engine.quantization.linear import QuantizedLinear


class MergedMLP(torch.nn.Module):
    """`down_proj(act(gate) * up)`; `kind` names the activation's kernel, if it has one."""

    def __init__(
        self,
        weight_XC: torch.Tensor,
        bias_X: torch.Tensor | None,
        down_proj: torch.nn.Module,
        act_fn: Any,
        kind: str | None,
    ) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(weight_XC, requires_grad=False)
        self.bias: Any = None
        self.narrow: QuantizedLinear | None = None
        if bias_X is not None:
            self.bias = torch.nn.Parameter(bias_X, requires_grad=False)
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module that it replaces."""
        out: torch.Tensor = self.down_proj(self.inner(x))
        return out

    def quantize(self, bits: int) -> bool:
        """Round the merged weight, which goes; False where that was done before."""
        if self.narrow is not None:
            return False
        self.narrow = QuantizedLinear(self.weight, self.bias, bits)
        self.weight = self.bias = None
        return True

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What `down_proj` is to take."""
        narrow = self.narrow
        both = F.linear(x, self.weight, self.bias) if narrow is None else narrow(x)
        if both.is_cuda and self.kind is not None:
            from pdbatch.engine.kernels.activation import gated

            return gated(both, self.kind)
        gate, up = both.chunk(2, dim=-1)
        out: torch.Tensor = self.act_fn(gate) * up
        return out
