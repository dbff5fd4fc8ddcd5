"""Ranks as threads of one process: together they compute what the whole model computes."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, Loop, loaded, make

from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.parallel.group import Group
from pdbatch.engine.parallel.shard import Sharder
from pdbatch.engine.quantization.convert import BITS, Quantizable, Quantization, Quantizer
from pdbatch.engine.quantization.rounding import rounded
from pdbatch.errors import ConfigError

Result = TypeVar("Result")


def on_ranks(size: int, folder: Path, work: Callable[[Group], Result]) -> list[Result]:
    """What each rank's thread returns; one that raises fails the test."""

    def rank(number: int) -> Result:
        torch.set_num_threads(1)
        return work(Group(folder / "meeting", number, size, torch.device("cpu"), limit_s=60))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))


def part_of(
    model: torch.nn.Module,
    group: Group,
    each: Callable[[torch.nn.Module], None] | None = None,
) -> LoadedModel:
    """This rank's part of a copy of the model."""
    whole = loaded(copy.deepcopy(model))
    sharder = Sharder(group, each)
    shard = sharder.shard(whole.model)
    return dataclasses.replace(whole, shard=shard, config=sharder.config(whole.config))


def prompts_of(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (5, 61, 1, 33)]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_give_the_tokens_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model, prompts = make(family), prompts_of(len(family))
    whole = Loop(loaded(copy.deepcopy(model))).generate(prompts, 12, 16)

    def work(group: Group) -> list[list[int]]:
        loop = Loop(part_of(model, group))
        assert loop.cache.shape.num_kv_heads == 1
        return loop.generate(prompts, 12, 16)

    assert on_ranks(2, tmp_path, work) == [whole, whole]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe", "phi3"])
def test_more_ranks_than_kv_heads_keep_the_same_ones(family: str, tmp_path: Path) -> None:
    model, prompts = make(family), prompts_of(3)
    whole = Loop(loaded(copy.deepcopy(model))).generate(prompts, 8, 16)
    found = on_ranks(
        4, tmp_path, lambda group: Loop(part_of(model, group)).generate(prompts, 8, 16)
    )
    assert found == [whole] * 4


def test_a_rank_keeps_its_part_of_the_weights_alone(tmp_path: Path) -> None:
    model = make("llama")

    def weights(module: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters())

    layers = sum(weights(layer) for layer in model.model.layers)
    found: list[Any] = on_ranks(2, tmp_path, lambda group: part_of(model, group).model)
    for part in found:
        mine = sum(weights(layer) for layer in part.model.layers)
        norms = 2 * 3 * 64
        assert mine == (layers - norms) // 2 + norms
        assert weights(part.lm_head) == 100 * 64


def test_heads_that_cannot_be_shared_are_refused_with_what_can_be() -> None:
    from pdbatch.engine.parallel.shard import check_heads

    config = make("llama").config
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 query heads") as refused:
        check_heads(config, 3)
    assert refused.value.remedy == "use --tensor-parallel-size 1, 2, 4"


def test_a_layer_that_does_not_run_merged_cannot_be_shared(tmp_path: Path) -> None:
    model = make("llama")
    model.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(16)

    def work(group: Group) -> None:
        with pytest.raises(ConfigError, match="1 of the model's 3 layers cannot be shared"):
            part_of(model, group)

    on_ranks(2, tmp_path, work)


@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_ranks_round_their_parts(kind: Quantization, tmp_path: Path) -> None:
    """As if each rank's part had had the rounded weights."""
    model, prompts = make("qwen2"), prompts_of(2)

    def rounded_here(layer: torch.nn.Module) -> None:
        for module in layer.modules():
            if isinstance(module, Quantizable):
                weight: Any = module.weight  # type: ignore[attr-defined]
                weight.data = rounded(weight.data, BITS[kind]).numbers(weight.shape[1])

    def work(group: Group) -> list[list[list[int]]]:
        quantizer = Quantizer(kind, group.device)
        made = [part_of(model, group, each) for each in (rounded_here, quantizer.layer)]
        quantizer.head(made[1].model)
        assert quantizer.count == 3 * 4 + 1
        head: Any = made[0].model.lm_head
        head.weight.data = rounded(head.weight.data, 8).numbers(head.weight.shape[1])
        return [Loop(part).generate(prompts, 12, 16) for part in made]

    (a, b), (c, d) = on_ranks(2, tmp_path, work)
    assert a == b == c == d
