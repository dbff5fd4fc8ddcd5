"""Attention as one operator, for compilers: a call with tensors and numbers, whatever the step is.

A compiler that traces a layer must not look into a step, which is another object each time. It
sees `pdbatch::paged_attention` with the number of a *place*; the runner puts each step there before
the model runs, and the operator finds it there. The layer's index comes as a tensor on the CPU, so
that equal layers are one program and not one for each index.

The operator writes K and V into the cache, which no argument names: a compiler that saw the pool
change might copy it. It is marked as having an effect, and calls keep their order, since each
layer's queries come from the layer before. Where nothing traces, the hook calls the step itself:
an operator's dispatch costs the host some microseconds a layer.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch.fx.node import has_side_effect

LAYER = "pdbatch_layer"
"""Attribute of an attention module: its index as a tensor [] on the CPU."""
_numbers = itertools.count()


class StepAttention(Protocol):
    """Attention of one step, for all its sequences and layers."""

    place: int
    """Where the operator finds it; set by `Place`."""

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
        """Write K and V of the step's tokens, then attend; [T, query heads, D].

        Called once for each layer, by the model's forward. K and V have their own number of
        heads. A token sees itself and what stands before it in its sequence, at most
        `window` tokens with itself; `softcap` c turns a score s into c * tanh(s / c).
        """
        ...


_steps: WeakValueDictionary[int, StepAttention] = WeakValueDictionary()


class Place:
    """Where one runner's step is found; it is not kept alive by that."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def hold(self, step: StepAttention) -> StepAttention:
        """Make it this place's step; gives it back."""
        step.place = self.number
        _steps[self.number] = step
        return step


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor layer, int place, float scaling, SymInt? window,"
    " float? softcap) -> Tensor"
)


@torch.library.custom_op("pdbatch::paged_attention", mutates_args=(), schema=_SCHEMA)
def paged_attention(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    layer: torch.Tensor,
    place: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[T, query heads, D]: `StepAttention.attend` of the step at `place`; `layer` is int64 []."""
    out_THD = _steps[place].attend(
        int(layer), q_HTD, k_HTD, v_HTD, scaling=scaling, window=window, softcap=softcap
    )
    return out_THD.contiguous()


@paged_attention.register_fake
def _(q_HTD: torch.Tensor, k_HTD: torch.Tensor, v_HTD: torch.Tensor, *_others: Any) -> torch.Tensor:
    return q_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[2])


has_side_effect(torch.ops.pdbatch.paged_attention.default)


def name_layers(model: torch.nn.Module) -> None:
    """Give every attention its index as the operator wants it; again is harmless."""
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            setattr(module, LAYER, torch.tensor(index))


def traced(
    module: Any,
    step: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """What a compiler sees instead of `step.attend`."""
    layer = getattr(module, LAYER)
    q, k, v = query[0], key[0], value[0]
    out_THD: torch.Tensor = torch.ops.pdbatch.paged_attention(
        q, k, v, layer, step.place, scaling, window, softcap
    )
    return out_THD
