"""What a model leaves in the cache, found by running one token through it.

Configurations name head sizes in many ways; the shapes that reach the attention do not lie.
"""

from __future__ import annotations

from typing import Any

import torch

from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.attention.operator import Place
from pdbatch.errors import ModelError

_REMEDY = "choose a decoder whose layers all attend with the same heads (llama, qwen3, gemma2, …)"


class Probe:
    """A `StepAttention` that notes shapes and attends to nothing."""

    place = -1

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int]] = []
        """(layer, KV heads, key size, value size) in the order of the calls."""

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
        self.seen.append((layer, k_HTD.shape[0], k_HTD.shape[2], v_HTD.shape[2]))
        return q_HTD.new_zeros(q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[2])


def cache_dims(model: Any, device: torch.device, num_layers: int) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of a model. Raises ModelError if it cannot be paged."""
    probe = Probe()
    Place().hold(probe)  # layers may be compiled already
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        model(input_ids=zero, position_ids=zero, use_cache=False, **{KEYWORD: probe})
    if [seen[0] for seen in probe.seen] != list(range(num_layers)):
        layers = len({seen[0] for seen in probe.seen})
        message = f"{layers} of the model's {num_layers} layers attend in a way that can be paged"
        raise ModelError(message, remedy=_REMEDY)
    dims = {seen[1:] for seen in probe.seen}
    if len(dims) > 1:
        shapes = ", ".join(f"{heads} heads of {size}" for heads, size, _ in sorted(dims))
        raise ModelError(f"the model's layers differ in their KV heads ({shapes})", remedy=_REMEDY)
    heads, key_size, value_size = dims.pop()
    if key_size != value_size:
        message = f"the model's keys have {key_size} numbers and its values {value_size}"
        raise ModelError(message, remedy=_REMEDY)
    return num_layers, heads, key_size
