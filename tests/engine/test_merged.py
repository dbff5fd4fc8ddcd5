"""Merged layers against the model that they were made from, family by family."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, Loop, loaded, make

from pdbatch.engine import merged
from pdbatch.engine.attention.hook import KEYWORD
from pdbatch.engine.merged import facts


def _prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (5, 61, 1, 33)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family: str) -> None:
    model = make(family)
    other = copy.deepcopy(model)
    plain, engine = loaded(model), loaded(other)
    count = merged.merge(other)
    assert count == 3, "every layer of every family is known"
    one, two = Loop(plain), Loop(engine)
    prompts = _prompts(len(family))
    everyone = list(range(len(prompts)))
    for work in ([list(p) for p in prompts], [[7]] * 4, [[9]] * 4):
        a = one.step(list(enumerate(work)), everyone)
        b = two.step(list(enumerate(work)), everyone)
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2"])
def test_half_precision_stays_as_close(family: str) -> None:
    """bfloat16, merged and not, are about equally far from float32."""
    exact = make(family)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    fused = copy.deepcopy(half)
    found = []
    for model in (exact, half, fused):
        engine = dataclasses.replace(loaded(model), dtype=model.dtype)
        if model is fused:
            assert merged.merge(model) == 3
        prompts = _prompts(1)
        found.append(Loop(engine).step(list(enumerate(prompts)), list(range(4))).double())
    own, ours = ((x - found[0]).norm() for x in found[1:])
    assert ours < 1.5 * own + 1e-3, f"{ours:.3g} against {own:.3g}"


def test_styles_are_found_by_their_numbers() -> None:
    found = {}
    for family in ("llama", "gemma", "olmo2", "ernie4_5", "phi3"):
        model = make(family)
        layer = model.model.layers[0]
        style = facts.norm_style(layer.post_attention_layernorm)
        hook = loaded(model)
        seen = facts.observe(hook.model, {0: layer.self_attn})[0]
        found[family] = (style, seen.pairs, seen.num_turning, seen.num_kv_heads)
    assert found == {
        "llama": (0, False, 16, 2),
        "gemma": (2, False, 16, 2),
        "olmo2": (1, False, 16, 2),
        "ernie4_5": (0, True, 16, 2),
        "phi3": (0, False, 16, 2),
    }


def test_a_layer_of_another_form_stays() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(16)
    model.model.layers[2].mlp.gate_proj = torch.nn.Sequential(torch.nn.Linear(64, 96))
    loaded(model)
    assert merged.merge(model) == 2
    assert type(model.model.layers[1]).__name__ == "LlamaDecoderLayer"
    assert type(model.model.layers[2].mlp).__name__ == "LlamaMLP"


class _Causal:
    """A step of one sequence, without a cache."""

    def __init__(self, wanted_rows: torch.Tensor | None = None) -> None:
        self.wanted_rows = wanted_rows

    def attend(self, layer, q_HTD, k_HTD, v_HTD, *, scaling, window, softcap):
        out_HTD = torch.nn.functional.scaled_dot_product_attention(
            q_HTD, k_HTD, v_HTD, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out_HTD.transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_gives_the_wanted_rows_alone(family: str) -> None:
    engine = loaded(make(family))
    assert merged.merge(engine.model) == 3
    assert merged.picks_rows(engine.model)
    ids, positions = torch.arange(3, 20)[None], torch.arange(17)[None]

    def run(step: _Causal) -> torch.Tensor:
        found = engine.model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, **{KEYWORD: step}
        )
        return found.last_hidden_state[0]

    with torch.inference_mode():
        everything = run(_Causal())
        rows = torch.tensor([4, 16, 0])
        torch.testing.assert_close(run(_Causal(rows)), everything[rows], rtol=1e-5, atol=1e-5)
