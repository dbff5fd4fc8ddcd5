"""A decoder layer whose residual stays where it is: products and norms are added into it."""

from __future__ import annotations

from typing import Any

import torch

from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.merged.attention import MergedAttention
from pdbatch.engine.merged.feedforward import MergedMLP
from pdbatch.engine.merged.norm import Norm
from pdbatch.engine.quantization.linear import QuantizedLinear


class MergedLayer(torch.nn.Module):
    """x += attention(norm(x)); x += feedforward(norm(x)); with norms after instead, or as well.

    The input's memory is the output's: whoever passes it in must not need it any more.
    """

    def __init__(
        self,
        self_attn: MergedAttention,
        mlp: torch.nn.Module,
        before: tuple[Norm | None, Norm | None],
        after: tuple[Norm | None, Norm | None],
        multiplier: float = 1.0,
    ) -> None:
        """`before` and `after` are the norms around attention and feed-forward."""
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.norm_1, self.norm_2 = before
        self.after_1, self.after_2 = after
        self._multiplier = multiplier
        self.is_last = False
        """Whether nobody after it needs other rows than those whose logits are wanted."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the layer that it replaces; `hidden_states` is changed.

        The last layer gives the step's `wanted_rows` alone, where it names some: of a prompt, one.
        """
        x = hidden_states
        inner = x if self.norm_1 is None else self.norm_1(x)
        step = kwargs[KEYWORD]
        inner = self.self_attn.heads(inner, position_embeddings, step)
        if self.is_last and (rows := getattr(step, "wanted_rows", None)) is not None:
            x, inner = x.index_select(1, rows), inner.index_select(1, rows)
        x = self._add(x, self.self_attn.o_proj, inner, self.after_1)
        inner = x if self.norm_2 is None else self.norm_2(x)
        if isinstance(self.mlp, MergedMLP):
            return self._add(x, self.mlp.down_proj, self.mlp.inner(inner), self.after_2)
        return self._add(x, self.mlp, inner, self.after_2)

    def _add(
        self, x: torch.Tensor, last: torch.nn.Module, inner: torch.Tensor, after: Norm | None
    ) -> torch.Tensor:
        """`x` plus `after(last(inner))`."""
        if after is not None:
            added: torch.Tensor = after(last(inner), x)
            return added
        if type(last) is torch.nn.Linear and last.bias is None:
            flat_TC = x.view(-1, x.shape[-1])
            flat_TC.addmm_(inner.flatten(0, 1), last.weight.t(), alpha=self._multiplier)
            return x
        if isinstance(last, QuantizedLinear):
            return last.add_into(x, inner, self._multiplier)
        return x.add_(last(inner), alpha=self._multiplier)
