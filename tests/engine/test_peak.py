"""The largest step, and a GPU runner's rehearsal, in Triton's interpreter; no GPU's numbers."""

from __future__ import annotations

import contextlib
import logging
import types

import pytest
import tiny_models
import torch
from triton_machine import GPU

from pdbatch.engine import peak, runner
from pdbatch.engine.gpu_runner import GpuRunner, prepare_model
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.sizing import Sizes

pytestmark = pytest.mark.skipif(GPU, reason="a GPU has its own tests")
SIZES = Sizes(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=64)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """One whose GPU runner runs on the CPU."""

    def last_tokens(self, batch):
        return torch.tensor([batch.cu_seqlens_q[s + 1] - 1 for s in batch.logits_indices] or [0])

    properties = types.SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(GpuRunner, "_last_tokens", last_tokens)
    loaded = tiny_models.loaded(tiny_models.make("llama"))
    prepare_model(loaded)
    return loaded


def test_the_largest_step_runs_over_one_block(model, monkeypatch) -> None:
    rows: list[tuple[int, int]] = []
    execute = GpuRunner.execute

    def executed(self, batch):
        logits = execute(self, batch)
        rows.append((len(batch.input_ids_T), len(logits)))
        return logits

    monkeypatch.setattr(GpuRunner, "execute", executed)
    monkeypatch.setattr(peak, "taken_by", lambda step, device: step() or 123)
    assert peak.measured(model, runner.kv_shape(model, 16), SIZES) == 123
    assert rows == [(40, 6), (40, 6)]


def test_a_step_that_does_not_fit_is_told_and_other_errors_come_through(model, monkeypatch) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("illegal access")]

    def starved(step, device):
        raise errors.pop(0)

    monkeypatch.setattr(peak, "taken_by", starved)
    assert peak.measured(model, runner.kv_shape(model, 16), SIZES) is None
    with pytest.raises(RuntimeError, match="illegal"):
        peak.measured(model, runner.kv_shape(model, 16), SIZES)


def test_a_rehearsal_without_memory_is_cut_short(model, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    cache = PagedKVCache(runner.kv_shape(model, 16), 2, "cpu")
    made = GpuRunner(model, cache, max_num_seqs=4, max_model_len=20, cuda_graphs=False)
    made.warmup()
    assert "0 graphs" in caplog.text and "no memory" not in caplog.text

    def starved(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GpuRunner, "execute", starved)
    made.warmup()
    assert "the rehearsal of steps found no memory" in caplog.text
