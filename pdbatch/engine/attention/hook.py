"""The one function that transformers calls for each layer of each step.

A model whose configuration names `IMPLEMENTATION` makes no masks of its own (transformers
makes none for an attention it does not know) and hands every keyword on to us. A compiler that
traces a layer meets an operator here (`operator`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pdbatch.engine.attention import operator
from pdbatch.engine.attention.operator import StepAttention
from pdbatch.errors import ModelError

IMPLEMENTATION = "pdbatch_paged"
KEYWORD = "pdbatch_step"


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; again is harmless."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; q, k, v are [1, heads, T, D], the result [1, T, heads, D].

    Raises ModelError for a model that needs what no backend here can do.
    """
    if others.get("s_aux") is not None:
        raise ModelError("attention with sinks is not supported", remedy="choose another model")
    step: StepAttention | None = others.get(KEYWORD)
    if step is None:
        raise ModelError(
            f"the attention of {type(module).__name__} does not pass the step on",
            remedy="choose another model: this family's layers take no keywords",
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        out_THD = operator.traced(module, step, query, key, value, scaling, sliding_window, softcap)
        return out_THD.unsqueeze(0), None
    out_THD = step.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out_THD.unsqueeze(0), None
