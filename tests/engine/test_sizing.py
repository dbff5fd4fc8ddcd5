"""How large steps and pools become on a GPU, with the GPU's numbers made up."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import tiny_models
import torch

from pdbatch.engine import runner, sizing
from pdbatch.engine.config import EngineConfig, most_batched_tokens, most_seqs
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.memory import Room
from pdbatch.engine.pool import allocated
from pdbatch.engine.sizing import Sizes
from pdbatch.errors import ConfigError

GIB = 1 << 30


def config(**values) -> EngineConfig:
    return EngineConfig(model="m", home="h", **values)


def room(total: float = 80, weights: float = 15, others: float = 0.6, share: float = 0.9) -> Room:
    return Room(
        name="cuda:0",
        total_bytes=int(total * GIB),
        weights_bytes=int(weights * GIB),
        other_bytes=int(others * GIB),
        share=share,
    )


@pytest.fixture
def model() -> LoadedModel:
    return tiny_models.loaded(tiny_models.make("llama"))


def on_gpu(model: LoadedModel, monkeypatch, *, total: int, free: int, held: int) -> LoadedModel:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held)
    return dataclasses.replace(model, device=torch.device("cuda:0"))


def test_the_share_counts_what_this_process_holds_and_the_rest_what_is_free() -> None:
    alone = room()
    assert alone.left(0) == pytest.approx((80 * 0.9 - 15) * GIB, abs=2)
    assert alone.left(3 * GIB) == pytest.approx((80 * 0.9 - 15 - 3) * GIB, abs=2)
    beside = room(others=40)
    assert beside.left(GIB) == pytest.approx((80 * 0.98 - 15 - 40 - 1) * GIB, abs=2)
    assert room(total=16).left(0) < 0
    text = str(beside)
    for number in ("80.00", "90%", "15.00", "40.00"):
        assert number in text


def steps(gib_each_16k: float, fixed: float = 0.0, most: float = 1e9):
    """A model whose steps need so much for 16,384 tokens, and so much for 512 sequences."""
    seen: list[Sizes] = []

    def peak(sizes: Sizes) -> int | None:
        seen.append(sizes)
        need = gib_each_16k * sizes.max_num_batched_tokens / 16384
        need += fixed * sizes.max_num_seqs / 512
        return int(need * GIB) if need < most else None

    return peak, seen


SIZES = Sizes(max_num_seqs=512, max_num_batched_tokens=16384, max_model_len=8192)


def fitted(config, room, peak) -> tuple[int, int]:
    sizes, _need = sizing.fit(config, SIZES, room, peak, int)
    return sizes.max_num_seqs, sizes.max_num_batched_tokens


def test_a_large_gpu_takes_the_defaults_at_the_first_try() -> None:
    peak, seen = steps(2.5)
    assert sizing.fit(config(), SIZES, room(), peak, int) == (SIZES, int(2.5 * GIB))
    assert len(seen) == 1


def test_on_a_small_gpu_steps_shrink_tokens_first() -> None:
    assert fitted(config(), room(total=24), steps(2.5)[0]) == (512, 8192)
    assert fitted(config(), room(total=19), steps(2.5, 0.2)[0]) == (512, 2048)
    assert fitted(config(), room(total=20), steps(2.5, 1.0)[0]) == (128, 2048)
    assert fitted(config(), room(total=24), steps(2.5, most=1.0)[0]) == (512, 4096)


def test_what_was_asked_for_is_kept() -> None:
    asked = config(max_num_batched_tokens=16384)
    assert fitted(asked, room(total=19), steps(2.5, 0.1)[0]) == (32, 16384)
    both = config(max_num_batched_tokens=16384, max_num_seqs=512)
    assert fitted(both, room(total=19), steps(2.5, 0.1)[0]) == (512, 16384)
    with pytest.raises(ConfigError, match="16384 tokens and 512 sequences") as raised:
        fitted(both, room(total=19), steps(2.5, most=1.0)[0])
    assert "max_num_batched_tokens" in (raised.value.remedy or "")


def test_ranks_agree_on_the_smallest() -> None:
    peak, seen = steps(2.5)
    answers = [0, 1]
    sizes, _ = sizing.fit(config(), SIZES, room(), peak, lambda _mine: answers.pop(0))
    assert sizes.max_num_batched_tokens == 8192 and len(seen) == 2


def test_the_pool_is_what_is_left_and_a_line_says_so(model, monkeypatch, caplog) -> None:
    shape = runner.kv_shape(model, 8)
    block = shape.block_bytes
    total = 1000 * block
    gpu = on_gpu(model, monkeypatch, total=total, free=880 * block, held=100 * block)
    caplog.set_level(logging.INFO)
    told = config(max_num_seqs=500, block_size=8)
    sizes, count = sizing.num_blocks(told, gpu, shape, lambda _: 30 * block)
    assert count == 900 - 100 - 30
    assert sizes.max_num_batched_tokens == most_batched_tokens("cuda:0")
    assert f"{count * 8} tokens" in caplog.text and "largest step" in caplog.text
    assert sizing.num_blocks(config(num_blocks=7, block_size=8), gpu, shape, None)[1] == 7
    gpu = on_gpu(model, monkeypatch, total=total, free=20 * block, held=100 * block)
    with pytest.raises(ConfigError, match="no room for a block") as raised:
        sizing.num_blocks(told, gpu, shape, lambda _: 30 * block)
    assert "gpu_memory_utilization" in (raised.value.remedy or "")


def test_a_step_that_cannot_be_run_is_guessed(model, monkeypatch, caplog) -> None:
    gpu = on_gpu(model, monkeypatch, total=80 * GIB, free=64 * GIB, held=15 * GIB)

    def fails(_: Sizes) -> int | None:
        raise RuntimeError("no kernel for this")

    with caplog.at_level(logging.INFO):
        _, count = sizing.num_blocks(config(), gpu, runner.kv_shape(model, 16), fails)
    assert count > 0
    assert "no kernel for this" in caplog.text and "guessed" in caplog.text


def test_two_engines_share_a_gpu_whichever_comes_first(model, monkeypatch) -> None:
    """What the first one took is not taken off the second one's share once more."""
    shape = runner.kv_shape(model, 8)
    total, block = 1000 * shape.block_bytes, shape.block_bytes
    told = config(gpu_memory_utilization=0.45, block_size=8, max_num_seqs=500)
    for free, expected in ((0.9, 449), (0.52, 449), (0.2, 179)):
        gpu = on_gpu(model, monkeypatch, total=total, free=int(free * total), held=1_000)
        assert sizing.num_blocks(told, gpu, shape, lambda _: 1_000)[1] in (expected - 1, expected)
    _sizes, guessed = sizing.num_blocks(told, gpu, shape, None)
    assert guessed == pytest.approx((0.2 - 0.02 - 0.05) * total / block, abs=2)


def test_no_more_blocks_than_can_be_of_use(model, monkeypatch) -> None:
    shape = runner.kv_shape(model, 8)
    gpu = on_gpu(model, monkeypatch, total=80 * GIB, free=79 * GIB, held=GIB)
    told = config(block_size=8, max_num_seqs=4, max_model_len=64)
    assert sizing.num_blocks(told, gpu, shape, lambda _: 0)[1] == 2 * 4 * 8


def test_the_defaults_of_a_device() -> None:
    assert (most_seqs("cuda:3"), most_seqs("cuda"), most_seqs("cpu")) == (512, 512, 64)
    assert (most_batched_tokens("cuda:3"), most_batched_tokens("cpu")) == (16384, 2048)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("x")])
def test_a_pool_that_finds_no_memory_is_made_smaller(error: Exception) -> None:
    asked: list[int] = []

    def allocate(count: int) -> str:
        asked.append(count)
        if count > 750:
            raise error
        return f"{count} blocks"

    assert allocated(allocate, 1000, may_shrink=True) == ("729 blocks", 729)
    assert asked == [1000, 900, 810, 729]
    with pytest.raises(ConfigError, match="1000 blocks"):
        allocated(allocate, 1000, may_shrink=False)
    asked.clear()
    with pytest.raises(ConfigError, match="10000 blocks"):
        allocated(allocate, 10_000, may_shrink=True)
    assert len(asked) < 30

    def broken(count: int) -> str:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        allocated(broken, 10, may_shrink=True)
