"""A linear layer whose weight is kept in 8 or 4 bits.

    few rows (a decode step)   a kernel reads the weight as it is kept: `kernels.narrow`
    many rows (a prefill)      the weight is widened into memory that is let go at once, then a
                               plain product: its time is hidden by what the product takes
    no Triton, not bfloat16    as for many rows, in plain torch

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from pdbatch.engine.quantization import packed
from pdbatch.engine.quantization.cuts import MOST_ROWS, cut, piece
from pdbatch.engine.quantization.rounding import rounded

MOST_TILES = 4096
"""Of a product: what counts the shares that have arrived has a place for each."""


class QuantizedLinear(torch.nn.Module):
    """y = x W^T + bias, W rounded when built. Runs forward only, on the weight's device."""

    q: torch.Tensor
    scales: torch.Tensor
    arrived: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, bits: int) -> None:
        """`weight_NK` is not kept."""
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self._bits, self._dtype = bits, weight_NK.dtype
        q, scales = packed.pack(rounded(weight_NK.detach(), bits))
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self._has_kernel = q.is_cuda and importlib.util.find_spec("triton") is not None
        count = MOST_TILES if self._has_kernel else 0
        arrived = torch.zeros(count, dtype=torch.int32, device=weight_NK.device)
        self.register_buffer("arrived", arrived)
        self.bias = None
        if bias_N is not None:
            self.bias = torch.nn.Parameter(bias_N.detach(), requires_grad=False)

    @property
    def is_cuda(self) -> bool:
        """Whether the weight is on a GPU."""
        return self.q.is_cuda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        flat_TK = x.reshape(-1, self.in_features)
        if not self._has_kernel:
            return F.linear(x, self.widened(), self.bias)
        out_TN = flat_TK.new_empty(flat_TK.shape[0], self.out_features)
        if self._narrow(flat_TK):
            self._product(flat_TK, out_TN, None)
        else:
            self._in_pieces(flat_TK, out_TN, None)
        return out_TN.view(*x.shape[:-1], self.out_features)

    def add_into(self, residual: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """residual += alpha * forward(x), in the residual's memory; gives the residual."""
        flat_TK = x.reshape(-1, self.in_features)
        flat_TN = residual.view(-1, self.out_features)
        if self._narrow(flat_TK):
            self._product(flat_TK, flat_TN, alpha)
        else:
            self._in_pieces(flat_TK, flat_TN, alpha)
        return residual

    def widened(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of the weight as numbers of the model's dtype: [last - first, K], or all."""
        last = self.out_features if last is None else last
        if not self._has_kernel:
            made = packed.unpack(self.q[:, first:last], self.scales[..., first:last])
            return made.numbers(self.in_features).to(self._dtype)
        from pdbatch.engine.kernels import widening

        some_NK = torch.empty(
            last - first, self.in_features, dtype=self._dtype, device=self.q.device
        )
        widening.widen(self.q, self.scales, some_NK, first)
        return some_NK

    def _in_pieces(self, flat_TK: torch.Tensor, out_TN: torch.Tensor, alpha: float | None) -> None:
        """Widen some outputs' weights, multiply, and let them go before the next."""
        size = piece(self.out_features, self.in_features)
        for first in range(0, self.out_features, size):
            last = min(first + size, self.out_features)
            some_NK, some_TN = self.widened(first, last), out_TN[:, first:last]
            bias = None if self.bias is None else self.bias[first:last]
            if alpha is not None:
                some_TN.addmm_(flat_TK, some_NK.t(), alpha=alpha)
                if bias is not None:
                    some_TN.add_(bias, alpha=alpha)
            elif bias is None:
                torch.mm(flat_TK, some_NK.t(), out=some_TN)
            else:
                torch.addmm(bias, flat_TK, some_NK.t(), out=some_TN)
            del some_NK  # so that the next piece gets its memory

    def _narrow(self, flat_TK: torch.Tensor) -> bool:
        """Whether the kernel is to take these rows."""
        fits = flat_TK.dtype == torch.bfloat16 and flat_TK.shape[0] <= MOST_ROWS
        return fits and self._has_kernel

    def _product(self, flat_TK: torch.Tensor, out_TN: torch.Tensor, alpha: float | None) -> None:
        from pdbatch.engine.kernels import narrow

        tiles = cut(self._bits, flat_TK.shape[0], self.out_features, self.q.shape[0])
        narrow.product(
            flat_TK,
            self.q,
            self.scales,
            out_TN,
            tiles,
            self.arrived,
            bias_N=self.bias,
            alpha=alpha,
        )
