"""Runs one step of the model over the paged cache.

The scheduler decides, the runner obeys: it checks nothing about who owns a block. Once a
model is loaded: `kv_shape`, then a `PagedKVCache` of that shape, then one runner (`make_runner`),
`warmup`, and `execute` for each step. `ModelRunner` serves every device in plain torch;
`gpu_runner.GpuRunner` serves CUDA where Triton is installed.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from pdbatch.engine.attention import paged
from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.attention.operator import Place
from pdbatch.engine.attention.probe import cache_dims
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.pending import put_tokens

if TYPE_CHECKING:
    from pdbatch.engine.gpu_runner import GpuRunner


def kv_shape(loaded: LoadedModel, block_size: int) -> KVShape:
    """What a token of this model leaves in the cache; runs one token through it.

    Raises ModelError if the layers differ, or attend in a way that the engine cannot page.
    """
    layers = loaded.config.num_hidden_layers
    num_layers, heads, size = cache_dims(loaded.model, loaded.device, layers)
    return KVShape(
        num_layers=num_layers,
        num_kv_heads=heads,
        head_dim=size,
        dtype=loaded.dtype,
        block_size=block_size,
    )


def make_runner(
    loaded: LoadedModel,
    cache: PagedKVCache,
    config: EngineConfig,
    *,
    max_num_seqs: int,
    max_model_len: int,
) -> ModelRunner | GpuRunner:
    """The runner of the model's device."""
    if not runs_triton(loaded.device):
        return ModelRunner(loaded, cache, config)
    from pdbatch.engine.gpu_runner import GpuRunner

    return GpuRunner(
        loaded,
        cache,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        cuda_graphs=config.cuda_graphs,
        decodes_here=config.role != "prefill",
        compiled=config.compile == "on",
    )


def prepare_model(loaded: LoadedModel) -> None:
    """Bring the model's layers into the form that its runner wants, before memory is counted."""
    if runs_triton(loaded.device):
        from pdbatch.engine import gpu_runner

        gpu_runner.prepare_model(loaded)


def runs_triton(device: torch.device) -> bool:
    """Whether this device runs Triton's kernels here."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class ModelRunner:
    """One model over one cache. Not safe for several threads."""

    def __init__(self, loaded: LoadedModel, cache: PagedKVCache, config: EngineConfig) -> None:
        self.loaded = loaded
        self.cache = cache
        self._config = config
        self._model: Any = loaded.model
        self._workspace = paged.Workspace()
        self._place = Place()

    @torch.inference_mode()
    def execute(self, batch: ModelInput) -> torch.Tensor:
        """Run one step: K and V of all its tokens are written, then attended to.

        Gives logits [len(batch.logits_indices), V] in the model's dtype, on its device, one
        row for the last token of each sequence named in `logits_indices`, in that order.
        """
        device = self.loaded.device
        paged.start_blocks(self.cache, batch.slot_mapping_T)
        step = self._place.hold(paged.PagedStep(self.cache, batch, self._workspace))
        ids_T = batch.input_ids_T.to(device)
        put_tokens(ids_T, batch.tokens_before)
        inputs = {
            "input_ids": ids_T.unsqueeze(0),
            "position_ids": batch.positions_T.to(device).unsqueeze(0),
            "use_cache": False,
            KEYWORD: step,
        }
        if not batch.logits_indices:
            self._model.base_model(**inputs)
            return torch.empty(0, self.loaded.vocab_size, dtype=self.loaded.dtype, device=device)
        last = [batch.cu_seqlens_q[seq + 1] - 1 for seq in batch.logits_indices]
        keep = torch.tensor(last, device=device)
        logits: torch.Tensor = self._model(**inputs, logits_to_keep=keep).logits[0]
        return logits

    def warmup(self) -> None:
        """Run a prefill and a decode over block 0, so that the first request finds all warm.

        Call before any block is used: block 0's content is overwritten.
        """
        count = min(self.cache.shape.block_size - 1, 8)
        if count < 1:
            return
        self.execute(_warm(range(count), num_decodes=0))
        self.execute(_warm(range(count, count + 1), num_decodes=1))

    def close(self) -> None:
        """Nothing is held besides the model."""


def _warm(positions: range, num_decodes: int) -> ModelInput:
    where = torch.arange(positions.start, positions.stop)
    return ModelInput(
        input_ids_T=torch.zeros_like(where),
        positions_T=where,
        slot_mapping_T=where,
        cu_seqlens_q=[0, len(positions)],
        context_lens=[positions.stop],
        block_tables_SM=torch.zeros(1, 1, dtype=torch.int32),
        logits_indices=[0],
        num_decodes=num_decodes,
    )
