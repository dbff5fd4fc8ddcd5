"""Linear layers with their weights laid out for the CPU's matrix kernels.

A plain product rearranges the weight each time it runs, which at small batches costs as
much as the product. Packed once after loading, it does not; the numbers are the same sums.
"""

from __future__ import annotations

import torch


class PackedLinear(torch.nn.Module):
    """A linear layer over a packed weight, for inference on the CPU."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return out


def available(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have packed kernels for a dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Replace the model's plain linear layers in place; how many were.

    None where this torch or processor has no packed kernels for `dtype`. Weights that are
    shared (embeddings) keep their plain form for the other user.
    """
    if not available(dtype):
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.dtype == dtype:
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
