"""Models of random weights in shapes that people know: `random:llama-3-8b`, `random:tiny:4`.

What a step costs depends on a model's shape and not on its weights, so the speed of an engine, or
of a whole cluster, can be measured without a download. The weights are made on the device, in the
dtype they run in, equal in every process of one kind of device (seed 0). What follows the shape
is the number of layers. There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from pdbatch.engine.attention import hook
from pdbatch.errors import ModelError

PREFIX: Final = "random:"


def _shape(
    family: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        **more,
    }


_LLAMA_3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128_256, **_LLAMA_3),
    "llama-3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128_256, **_LLAMA_3),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151_936, head_dim=128),
    "qwen3-30b-a3b": _shape("qwen3_moe", 2048, 6144, 48, 32, 4, 151_936, head_dim=128, **_EXPERTS),
    "mixtral-8x7b": _shape(
        "mixtral", 4096, 14336, 32, 32, 8, 32_000, num_local_experts=8, num_experts_per_tok=2
    ),
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49_152, tie_word_embeddings=True),
    "tiny": _shape("llama", 64, 128, 2, 4, 2, 512),
}
"""Keywords of transformers' configurations, by the name after `random:`."""


def is_random(model: str) -> bool:
    """Whether the name means a model of random weights."""
    return model.startswith(PREFIX)


def config_of(model: str) -> Any:
    """The configuration of `random:SHAPE` or `random:SHAPE:LAYERS`. Raises ModelError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, _, layers = model.removeprefix(PREFIX).partition(":")
    if name not in SHAPES or (layers and not (layers.isdecimal() and int(layers))):
        remedy = f"give random:SHAPE or random:SHAPE:LAYERS, SHAPE one of {', '.join(SHAPES)}"
        raise ModelError(f"there is no model {model!r}", remedy=remedy)
    fields = dict(SHAPES[name])
    if layers:
        fields["num_hidden_layers"] = int(layers)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def make(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of this configuration, weights from seed 0, made on `device`."""
    from transformers import AutoModelForCausalLM

    family: Any = AutoModelForCausalLM
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        return family.from_config(config, dtype=dtype, attn_implementation=hook.IMPLEMENTATION)
