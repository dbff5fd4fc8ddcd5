"""Runs steps on a GPU: merged layers, Triton attention, CUDA graphs for decodes.

    a step of decodes alone   its numbers go to fixed places, a captured graph runs the body
    any other                 its numbers go to fresh memory, the body runs operation by operation
    either                    the head runs for the rows that need logits

The body is transformers' model below its language head. Call `prepare_model` before the cache is
sized, then make one `GpuRunner`. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from pdbatch.engine import experts, merged, rehearsal
from pdbatch.engine.attention import decodes, prepare
from pdbatch.engine.attention.equal import EqualPrompts, serves
from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.attention.operator import Place
from pdbatch.engine.attention.packed import takes_packed
from pdbatch.engine.attention.triton_step import TritonStep
from pdbatch.engine.attention.upload import Upload
from pdbatch.engine.compiled import Compiled
from pdbatch.engine.graphs import DecodeGraphs
from pdbatch.engine.kernels.dependent import forbid
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.memory import is_shortage, release_unused
from pdbatch.engine.model_input import ModelInput

logger = logging.getLogger(__name__)


def prepare_model(loaded: LoadedModel) -> None:
    """Merge the layers that are known, and take the experts over; again is harmless."""
    if merged.merge(loaded.model):
        torch.cuda.empty_cache()  # holes that the old weights left, which nothing would fit into
    experts.use(loaded.model)


class GpuRunner:
    """One model over one cache on a GPU. Not safe for several threads."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: PagedKVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        cuda_graphs: bool = True,
        decodes_here: bool = True,
        compiled: bool = False,
    ) -> None:
        """Without `decodes_here` no graphs are captured before they are needed.

        With `compiled` layers that are not merged are compiled, which `warmup` sees through.
        """
        self.loaded = loaded
        self.cache = cache
        device = loaded.device
        if loaded.shard is not None:
            forbid()  # beside kernels that wait for other ranks it has not been tried
        config: Any = loaded.config
        self._body: Any = loaded.model.base_model
        self._head = Head(loaded.model)
        self._place = Place()
        self._picks_rows = merged.picks_rows(loaded.model)
        self._upload = Upload(device)
        self._sizes = decodes.Sizes(
            num_q_heads=int(config.num_attention_heads),
            shape=cache.shape,
            processors=torch.cuda.get_device_properties(device).multi_processor_count,
            windowed=getattr(config, "sliding_window", None) is not None,
            equal=EqualPrompts() if serves(device, cache.shape.head_dim, loaded.dtype) else None,
            packed=takes_packed(device, cache.shape.head_dim),
        )
        self._compiled = Compiled(loaded.model) if compiled else None
        self._max_model_len, self._decodes_here = max_model_len, decodes_here
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs:
            most_blocks = -(-max_model_len // cache.shape.block_size)
            captured = prepare.Captured(self._sizes, self._upload, max_num_seqs, most_blocks)
            self._graphs = DecodeGraphs(self._run, captured, self._sizes, max_num_seqs)

    @torch.inference_mode()
    def execute(self, batch: ModelInput) -> torch.Tensor:
        """As `runner.ModelRunner.execute`."""
        with torch.cuda.device(self.loaded.device):  # kernels, graphs and events go by it
            return self._execute(batch)

    def _execute(self, batch: ModelInput) -> torch.Tensor:
        count = len(batch.context_lens)
        if batch.num_decodes == count:
            hidden_TC = self._graphs.run(batch) if self._graphs is not None else None
            if hidden_TC is None:
                hidden_TC = self._run(prepare.eager(batch, self._sizes, self._upload))
            if len(batch.logits_indices) == count:
                return self._head(hidden_TC[:count])
            return self._head(hidden_TC.index_select(0, self._last_tokens(batch)))
        rows = self._last_tokens(batch)
        hidden_TC = self._run(prepare.eager(batch, self._sizes, self._upload), rows)
        if not batch.logits_indices:
            vocab, device = self.loaded.vocab_size, self.loaded.device
            return torch.empty(0, vocab, dtype=self.loaded.dtype, device=device)
        if not self._picks_rows:
            hidden_TC = hidden_TC.index_select(0, rows)
        return self._head(hidden_TC)

    def _last_tokens(self, batch: ModelInput) -> torch.Tensor:
        """Where the tokens are whose logits are wanted; the first one, if none are."""
        last = [batch.cu_seqlens_q[seq + 1] - 1 for seq in batch.logits_indices] or [0]
        return torch.tensor(last, pin_memory=True).to(self.loaded.device, non_blocking=True)

    def warmup(self) -> None:
        """Run every kind of step once and capture graphs, so that the first requests find all
        compiled. Call before any block is used. A rehearsal that finds no memory is cut short, but
        for a rank of several, where the others wait."""
        start_s, device = time.perf_counter(), self.loaded.device
        free_before, _ = torch.cuda.mem_get_info(device)
        try:
            if self._compiled is None or not self._compiled.tried(self._rehearse):
                self._rehearse()
        except RuntimeError as error:
            if self.loaded.shard is not None or not is_shortage(error):
                raise
            logger.warning("the rehearsal of steps found no memory: the first ones will be slower")
        torch.cuda.synchronize(device)
        release_unused()
        free, _ = torch.cuda.mem_get_info(device)
        logger.info(
            "%d graphs of decodes; every step was rehearsed in %.1f s, which took %.2f GiB "
            "and left %.2f",
            self._graphs.count if self._graphs is not None else 0,
            time.perf_counter() - start_s,
            (free_before - free) / 2**30,
            free / 2**30,
        )

    def _rehearse(self) -> None:
        for batch in rehearsal.mixed(self._sizes, self._max_model_len):
            self.execute(batch)
        if self._graphs is not None and self._decodes_here:
            with torch.cuda.device(self.loaded.device), torch.inference_mode():
                self._graphs.rehearse(self._max_model_len)

    def close(self) -> None:
        """Let go of the graphs. No step may follow."""
        self._graphs = None

    def _run(self, step: prepare.Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The body; [T, C], or those rows alone if the last layer picks them."""
        inputs = {
            "input_ids": step.input_ids_T.unsqueeze(0),
            "position_ids": step.positions_T.unsqueeze(0),
            "use_cache": False,
            KEYWORD: self._place.hold(TritonStep(self.cache, step.tables, rows)),
        }
        if self._compiled is None:
            output = self._body(**inputs)
        else:
            output = self._compiled.run(self._body, inputs)
        hidden_TC: torch.Tensor = output.last_hidden_state[0]
        return hidden_TC


class Head:
    """A causal language model from the body's output on: its own forward, the body left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._given = _Given()
        self._model: Any = copy.copy(model)
        prefix = str(model.base_model_prefix)
        self._model.__dict__["_modules"] = {**model._modules, prefix: self._given}

    def __call__(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of these rows."""
        self._given.hidden_1TC = hidden_TC.unsqueeze(0)
        logits: torch.Tensor = self._model(inputs_embeds=self._given.hidden_1TC).logits[0]
        return logits


class _Given(torch.nn.Module):
    """A body that has run already."""

    hidden_1TC: torch.Tensor

    def forward(self, **_inputs: Any) -> MoeModelOutputWithPast:
        hidden_1TC: Any = self.hidden_1TC  # transformers' versions differ in the type they name
        return MoeModelOutputWithPast(last_hidden_state=hidden_1TC)
