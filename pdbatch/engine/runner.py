"""Runs one step of the model over the paged cache."""

from __future__ import annotations

import torch

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.model_input import ModelInput


def kv_shape(loaded: LoadedModel, block_size: int) -> KVShape:
    """What a token of this model leaves in the cache.

    Raises ModelError if the layers differ, or attend in a way that the engine cannot page.
    """
    raise NotImplementedError


class ModelRunner:
    """One model over one cache. Not safe for several threads."""

    def __init__(self, loaded: LoadedModel, cache: PagedKVCache, config: EngineConfig) -> None:
        raise NotImplementedError

    def execute(self, batch: ModelInput) -> torch.Tensor:
        """Run one step: K and V of all its tokens are written, then attended to.

        Gives logits [len(batch.logits_indices), V] in the model's dtype, on its device, one
        row for the last token of each sequence named in `logits_indices`, in that order.
        """
        raise NotImplementedError

    def warmup(self) -> None:
        """Run a step or two over block 0 so that the first request finds memory and kernels.

        Call before any block is used: block 0's content is overwritten.
        """
        raise NotImplementedError
