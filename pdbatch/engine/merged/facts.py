"""What a model's layers do, observed while one token runs through them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.merged.norm import STYLES, normed

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """One layer's attention, as it called the hook."""

    layer: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    num_turning: int
    """Leading numbers of a head that turn."""
    rotate: Rotate
    """(q, k, cos, sin) as the family turns them."""
    pairs: bool | None
    """Whether neighbours turn together, or the two halves; None: neither."""


class Observer:
    """A `StepAttention` that notes how it is called and attends to nothing."""

    place = -1

    def __init__(self) -> None:
        self.calls: dict[int, dict[str, Any]] = {}

    def attend(
        self,
        layer: int,
        q_HTD: torch.Tensor,
        k_HTD: torch.Tensor,
        v_HTD: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        self.calls[layer] = {
            "num_q_heads": q_HTD.shape[0],
            "num_kv_heads": k_HTD.shape[0],
            "head_dim": q_HTD.shape[2],
            "scaling": scaling,
            "window": window,
            "softcap": softcap,
        }
        return q_HTD.new_zeros(q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[2])


def observe(model: Any, attentions: dict[int, torch.nn.Module]) -> dict[int, AttentionFacts]:
    """Run one token; facts of those attentions (by layer) that were called as expected."""
    turning: dict[int, int] = {}
    handles = []
    for layer, module in attentions.items():

        def note(_module: Any, _args: Any, kwargs: dict[str, Any], at: int = layer) -> None:
            embeddings = kwargs.get("position_embeddings")
            if embeddings is not None:
                turning[at] = int(embeddings[0].shape[-1])

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    observer = Observer()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    try:
        with torch.inference_mode():
            model.base_model(
                input_ids=zero, position_ids=zero, use_cache=False, **{KEYWORD: observer}
            )
    finally:
        for handle in handles:
            handle.remove()
    facts = {}
    for layer, module in attentions.items():
        rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if layer in observer.calls and layer in turning and rotate is not None:
            call = observer.calls[layer]
            pairs = turning_style(rotate, call["head_dim"], turning[layer])
            facts[layer] = AttentionFacts(
                layer=layer, num_turning=turning[layer], rotate=rotate, pairs=pairs, **call
            )
    return facts


def turning_style(rotate: Rotate, head_dim: int, num_turning: int) -> bool | None:
    """True if neighbours turn together, False if halves do, None if it is neither."""
    half = num_turning // 2
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 3, head_dim, generator=generator)
    angles = torch.rand(1, 3, half, generator=generator) * 6
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    with torch.inference_mode():
        given = rotate(q, q[:, :1], cos, sin)[0]
    for pairs in (False, True):
        a = slice(0, num_turning, 2) if pairs else slice(0, half)
        b = slice(1, num_turning, 2) if pairs else slice(half, num_turning)
        turned = q.clone()
        turned[..., a] = q[..., a] * angles.cos() - q[..., b] * angles.sin()
        turned[..., b] = q[..., b] * angles.cos() + q[..., a] * angles.sin()
        if torch.allclose(turned, given, atol=1e-5):
            return pairs
    return None


def norm_style(module: torch.nn.Module) -> int | None:
    """Which of `norm.STYLES` a norm is, found by its numbers in bfloat16; None: none."""
    weight = getattr(module, "weight", None)
    eps = norm_eps(module)
    if not isinstance(weight, torch.Tensor) or eps is None or weight.dim() != 1:
        return None
    probe: Any = copy.deepcopy(module).to(device="cpu", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(weight.shape[0], generator=generator).to(torch.bfloat16)
    x = torch.randn(9, weight.shape[0], generator=generator).to(torch.bfloat16)
    with torch.inference_mode():
        probe.weight.copy_(small)
        given = probe(x)
        for style in STYLES:
            if torch.equal(normed(x, small, eps, style), given):
                return style
    return None


def norm_eps(module: torch.nn.Module) -> float | None:
    """What a norm adds to the mean square, under either of its usual names."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return None


def activation(function: Any) -> str | None:
    """The kernel's name of an activation, found by its numbers; None: it has no kernel."""
    x = torch.linspace(-6, 6, 101)
    with torch.inference_mode():
        given = function(x)
    known = {
        "silu": F.silu(x),
        "gelu_pytorch_tanh": F.gelu(x, approximate="tanh"),
        "gelu": F.gelu(x),
    }
    for name, values in known.items():
        if torch.allclose(values, given, atol=1e-6):
            return name
    return None
