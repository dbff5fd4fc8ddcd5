"""The attention of a layer with its three projections in one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.merged.facts import AttentionFacts
from pdbatch.engine.merged.norm import FIRST, SHIFTED, Norm
from pdbatch.engine.quantization.linear import QuantizedLinear


class MergedAttention(torch.nn.Module):
    """Queries, keys and values in one product; turned and written by one kernel where there is one.

    A step that has `attend_merged` gets the product as it is; any other gets the three tensors.
    """

    def __init__(
        self,
        facts: AttentionFacts,
        weight_XC: torch.Tensor,
        bias_X: torch.Tensor | None,
        o_proj: torch.nn.Module,
        q_norm: Norm | None,
        k_norm: Norm | None,
    ) -> None:
        """`q_norm` and `k_norm` are of one head or of all of them together."""
        super().__init__()
        self.layer_idx = facts.layer
        self.weight: Any = torch.nn.Parameter(weight_XC, requires_grad=False)
        self.bias: Any = None
        self.narrow: QuantizedLinear | None = None
        if bias_X is not None:
            self.bias = torch.nn.Parameter(bias_X, requires_grad=False)
        self.o_proj = o_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self._facts = facts
        self._turning: Any = None
        if weight_XC.is_cuda:
            self._turning = self._kernel_turning()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As the module that it replaces."""
        heads = self.heads(hidden_states, position_embeddings, kwargs[KEYWORD])
        return self.o_proj(heads), None

    def heads(
        self,
        x_1TC: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: Any,
    ) -> torch.Tensor:
        """What `o_proj` is to take: [1, T, query heads * D]."""
        facts = self._facts
        if self.narrow is None:
            qkv_1TX = F.linear(x_1TC, self.weight, self.bias)
        else:
            qkv_1TX = self.narrow(x_1TC)
        cos, sin = position_embeddings
        constants = {"scaling": facts.scaling, "window": facts.window, "softcap": facts.softcap}
        if self._turning is not None and hasattr(step, "attend_merged"):
            out_THD = step.attend_merged(
                facts.layer, qkv_1TX[0], cos[0], sin[0], self._turning, **constants
            )
        else:
            q, k, v = self._split(qkv_1TX)
            q, k = facts.rotate(q, k, cos, sin)
            out_THD = step.attend(facts.layer, q[0], k[0], v[0], **constants)
        merged: torch.Tensor = out_THD.reshape(1, out_THD.shape[0], -1)
        return merged

    def quantize(self, bits: int) -> bool:
        """Round the merged weight, which goes; False where that was done before."""
        if self.narrow is not None:
            return False
        self.narrow = QuantizedLinear(self.weight, self.bias, bits)
        self.weight = self.bias = None
        self._turning = self._kernel_turning() if self.narrow.is_cuda else None
        return True

    @property
    def facts(self) -> AttentionFacts:
        """What it was made from."""
        return self._facts

    def _split(self, qkv_1TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values, normed where the model norms, [1, heads, T, D]."""
        facts, size = self._facts, self._facts.head_dim
        widths = [facts.num_q_heads * size, *[facts.num_kv_heads * size] * 2]
        q, k, v = qkv_1TX.split(widths, dim=-1)  # type: ignore[no-untyped-call]
        if self.q_norm is not None and self.k_norm is not None and not self._norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, size)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self._norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @property
    def _norms_heads(self) -> bool:
        return type(self.q_norm) is Norm and self.q_norm.weight.shape[0] == self._facts.head_dim

    def _kernel_turning(self) -> Any:
        """The kernel's description, or None where it cannot serve."""
        from pdbatch.engine.kernels.rotary import Turning

        facts, q_norm, k_norm = self._facts, self.q_norm, self.k_norm
        if facts.pairs is None:
            return None
        if q_norm is None or k_norm is None:
            return Turning(
                num_q_heads=facts.num_q_heads, num_turning=facts.num_turning, pairs=facts.pairs
            )
        if not self._norms_heads or q_norm.style not in (FIRST, SHIFTED):
            return None
        return Turning(
            num_q_heads=facts.num_q_heads,
            num_turning=facts.num_turning,
            pairs=facts.pairs,
            q_norm=q_norm.weight,
            k_norm=k_norm.weight,
            eps=q_norm.eps,
            shifted=q_norm.style == SHIFTED,
        )
