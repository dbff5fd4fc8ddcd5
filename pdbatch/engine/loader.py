"""From a model's name to a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdbatch.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what the engine must know of it."""

    model: torch.nn.Module
    """transformers' causal language model with paged attention, in eval mode, on `device`."""
    config: Any
    """Its transformers configuration (the text part)."""
    tokenizer: Tokenizer
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Most tokens of a sequence that the model was made for."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output unless `ignore_eos`."""
    name: str
    """Alias, hub name or folder's name: equal on every worker that serves the model."""
    vocab_size: int
    """Columns of the logits."""


def load(model: str, home: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a model (alias, folder, GGUF file or hub name).

    `dtype` auto is float32 on the CPU and the model's own on a GPU.
    Raises ModelError with a remedy if it cannot be found, converted, or run by this engine.
    """
    raise NotImplementedError


def prepare(model: str, home: str) -> Path:
    """The model's folder of safetensors, converted once into `home/models` where need be.

    Safe against several processes at once. Raises ModelError.
    """
    raise NotImplementedError
