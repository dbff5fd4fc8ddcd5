"""A model's linear layers made narrow, layer by layer, so that no device holds all of both.

What is made narrow: the projections of attention and feed-forward, and the language head, which
has 8 bits in any case. What is not: embeddings (also where the head shared their weight), norms,
biases.
"""

from __future__ import annotations

import logging
from typing import Any, Final, Literal, Protocol, cast, runtime_checkable

import torch

from pdbatch.engine import merged
from pdbatch.engine.quantization.linear import QuantizedLinear
from pdbatch.engine.quantization.rounding import SLAB
from pdbatch.errors import ConfigError

logger = logging.getLogger(__name__)

Quantization = Literal["wint8", "wint4"]
BITS: Final[dict[Quantization, int]] = {"wint8": 8, "wint4": 4}
"""Bits of a weight, by the names that FastDeploy has for weight-only quantization."""
HEAD_BITS: Final = 8
"""Of the language head: it costs nothing that could be measured, 4 bits cost much."""


def weight_bits(kind: Quantization) -> float:
    """Bits that a weight takes in memory, its share of the scales included."""
    return BITS[kind] + (32 / SLAB if kind == "wint4" else 0)


@runtime_checkable
class Quantizable(Protocol):
    """A module that holds a weight itself and can hold a narrow one instead."""

    def quantize(self, bits: int) -> bool:
        """Round the weight and let the old one go; False where that was done before."""


class Quantizer:
    """Makes the layers of one model narrow, on `device`."""

    def __init__(self, kind: Quantization, device: torch.device) -> None:
        self._bits, self._device = BITS[kind], device
        self.count = 0
        """Weights made narrow so far."""

    def model(self, model: Any) -> None:
        """All layers of a causal language model, merged on the way where they are known.

        Raises ConfigError for a model that cannot be quantized.
        """
        refuse_experts(model)
        merged.merge(model, self.layer)
        for layer in model.base_model.layers:
            self.layer(layer)
        if not self.count:
            raise ConfigError("no layer of this model is known to hold linear layers")
        self.head(model)

    def head(self, model: Any) -> None:
        """The language head: one product of each step, at 32 layers a seventh of all weights."""
        head = model.get_output_embeddings()
        if isinstance(head, Quantizable):
            self.count += head.to(self._device).quantize(HEAD_BITS)  # type: ignore[attr-defined]
        elif type(head) is torch.nn.Linear:
            bias = None if head.bias is None else head.bias.to(self._device)
            narrow = QuantizedLinear(head.weight.to(self._device), bias, HEAD_BITS)
            model.set_output_embeddings(narrow)
            self.count += 1
        logger.info("%d weights are narrow", self.count)

    def layer(self, layer: torch.nn.Module) -> None:
        """One layer, moved to the device first; again is harmless."""
        layer.to(self._device)
        for module in list(layer.modules()):
            if isinstance(module, Quantizable):
                self.count += module.quantize(self._bits)
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear:
                    bias = cast("torch.Tensor | None", child.bias)
                    setattr(module, name, QuantizedLinear(child.weight, bias, self._bits))
                    self.count += 1


def refuse_experts(model: Any) -> None:
    """Raises ConfigError for a mixture of experts, and for a model without layers."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ConfigError(f"a {type(model).__name__} cannot be quantized: it names no layers")
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 2 or "experts" in name.split("."):
            raise ConfigError(
                "a mixture of experts cannot be quantized: its experts are no linear layers",
                remedy="leave --quantization out, or name a dense model",
            )
