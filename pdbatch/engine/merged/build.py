"""Which layers are known, and how their parts are put together anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from pdbatch.engine.merged import facts as observed
from pdbatch.engine.merged.attention import MergedAttention
from pdbatch.engine.merged.feedforward import MergedMLP
from pdbatch.engine.merged.layer import MergedLayer
from pdbatch.engine.merged.norm import Norm

logger = logging.getLogger(__name__)

_FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Ernie4_5", "Phi3", "Granite"]
_FAMILIES += ["Mixtral", "Qwen3Moe", "Ernie4_5_Moe"]
_BEFORE = {f"{family}DecoderLayer" for family in _FAMILIES}
"""Layers of the form x + attention(norm(x)), x + feedforward(norm(x))."""
_AROUND = {"Gemma2DecoderLayer", "Gemma3DecoderLayer"}
"""Layers with a norm before and after both."""
_AFTER = {"Olmo2DecoderLayer"}
"""Layers with norms after both alone."""
_MLPS = {f"{family}MLP" for family in [*_FAMILIES, "Gemma2", "Gemma3", "Olmo2"]}


def merge(model: Any, each: Callable[[MergedLayer], None] | None = None) -> int:
    """Replace the layers of a causal language model in place; how many were.

    Each old layer's weights are freed as the new one's are made. The model must use the paged
    attention (`hook`), be in eval mode, and run forward only. `each` is called with every new layer
    before the next is made (a rank then keeps its part of it alone).
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not any(type(layer).__name__ in _known() for layer in layers):
        return 0
    attentions = {
        index: layer.self_attn
        for index, layer in enumerate(layers)
        if type(layer).__name__ in _known()
    }
    facts = observed.observe(model, attentions)
    styles: dict[tuple[type, int], int | None] = {}
    count = 0
    for index in range(len(layers)):
        if index in facts:
            made = _layer(layers[index], facts[index], styles)
            if made is not None:
                layers[index] = made
                count += 1
                if each is not None:
                    each(made)
    final = _norm(getattr(model.base_model, "norm", None), styles)
    if count and final is not None:
        model.base_model.norm = final
        if isinstance(layers[-1], MergedLayer):
            layers[-1].is_last = True
    logger.info("%d of %d layers run merged", count, len(layers))
    return count


def picks_rows(model: Any) -> bool:
    """Whether the model's last layer gives a step's `wanted_rows` alone."""
    layers = getattr(model.base_model, "layers", None)
    return layers is not None and getattr(layers[-1], "is_last", False) is True


def _known() -> set[str]:
    return _BEFORE | _AROUND | _AFTER


def _layer(old: Any, facts: observed.AttentionFacts, styles: Any) -> MergedLayer | None:
    """The layer anew, or None if a part of it is not what its class has."""
    kind = type(old).__name__
    names: tuple[str | None, ...] = ("input_layernorm", "post_attention_layernorm", None, None)
    if kind in _AROUND:
        names = (
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        )
    elif kind in _AFTER:
        names = (None, None, "post_attention_layernorm", "post_feedforward_layernorm")
    norms: list[Norm | None] = []
    for name in names:
        norm = _norm(getattr(old, name, None), styles) if name is not None else None
        if name is not None and norm is None:
            return None
        norms.append(norm)
    attention = _attention(old.self_attn, facts, styles)
    if attention is None:
        return None
    return MergedLayer(
        attention,
        _mlp(old.mlp),
        (norms[0], norms[1]),
        (norms[2], norms[3]),
        float(getattr(old, "residual_multiplier", 1.0)),
    )


def _attention(old: Any, facts: observed.AttentionFacts, styles: Any) -> MergedAttention | None:
    """The attention anew; the old module loses its projections."""
    names = ["qkv_proj"] if hasattr(old, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    width = (facts.num_q_heads + 2 * facts.num_kv_heads) * facts.head_dim
    norms = [_norm(getattr(old, name, None), styles) for name in ("q_norm", "k_norm")]
    if any(hasattr(old, name) for name in ("q_norm", "k_norm")) and None in norms:
        return None
    linears = [getattr(old, name, None) for name in names]
    if not all(type(linear) is torch.nn.Linear for linear in linears):
        return None
    if sum(linear.out_features for linear in linears if linear is not None) != width:
        return None
    weight, bias = _joined(old, names)
    return MergedAttention(facts, weight, bias, old.o_proj, norms[0], norms[1])


def _mlp(old: Any) -> torch.nn.Module:
    """The feed-forward anew if it is a plain gated one, else as it is."""
    names = ["gate_up_proj"] if hasattr(old, "gate_up_proj") else ["gate_proj", "up_proj"]
    act_fn = getattr(old, "act_fn", None) or getattr(old, "activation_fn", None)
    linears = [getattr(old, name, None) for name in names]
    plain = all(type(linear) is torch.nn.Linear for linear in linears)
    if type(old).__name__ not in _MLPS or act_fn is None or not plain:
        module: torch.nn.Module = old
        return module
    weight, bias = _joined(old, names)
    return MergedMLP(weight, bias, old.down_proj, act_fn, observed.activation(act_fn))


def _joined(owner: Any, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of these linear layers one below the other; the owner lets go of them."""
    linears: list[torch.nn.Linear] = [getattr(owner, name) for name in names]
    for name in names:
        delattr(owner, name)
    if len(linears) == 1:
        only = linears[0]
        return only.weight.detach(), None if only.bias is None else only.bias.detach()
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return weight, torch.cat(biases)


def _norm(old: Any, styles: dict[tuple[type, int], int | None]) -> Norm | None:
    """The norm anew, or None if it is none of the known styles."""
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    key = (type(old), weight.shape[0])
    if key not in styles:
        styles[key] = observed.norm_style(old)
    style, eps = styles[key], observed.norm_eps(old)
    return None if style is None or eps is None else Norm(weight.detach(), eps, style)
