"""Quantized models: the numbers of a plain model whose weights were rounded the same way."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, Loop, loaded, make

from pdbatch.engine import loader, part
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.llm import LLM
from pdbatch.engine.quantization.convert import BITS, Quantizer
from pdbatch.engine.quantization.linear import QuantizedLinear
from pdbatch.engine.quantization.rounding import rounded
from pdbatch.errors import ConfigError
from pdbatch.sampling import SamplingParams

CPU = torch.device("cpu")
EXPERTS = [name for name in FAMILIES if "moe" in name or name == "mixtral"]
PROMPTS = [[5, 9, 33, 2, 7], list(range(3, 44)), [11]]


def _round_in_place(model, bits: int) -> int:
    """What quantizing must amount to: every linear layer's weight rounded, in float32."""
    count = 0
    for module in model.base_model.layers.modules():
        if type(module) is torch.nn.Linear:
            module.weight.data = rounded(module.weight.data, bits).numbers(module.in_features)
            count += 1
    head = model.get_output_embeddings()
    model.set_output_embeddings(copy.deepcopy(head))  # apart from the embeddings
    head = model.get_output_embeddings()
    head.weight.data = rounded(head.weight.data, 8).numbers(head.in_features)
    return count


@pytest.mark.parametrize("kind", list(BITS))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EXPERTS])
def test_a_quantized_model_is_the_model_with_rounded_weights(family: str, kind) -> None:
    model = make(family)
    plain, narrow = copy.deepcopy(model), loaded(model)
    assert _round_in_place(plain, BITS[kind]) == 3 * len(
        [m for m in plain.base_model.layers[0].modules() if type(m) is torch.nn.Linear]
    )
    one, two = Loop(loaded(plain)), Loop(narrow)
    quantizer = Quantizer(kind, CPU)
    quantizer.model(narrow.model)
    assert quantizer.count == 3 * 4 + 1  # merged: queries with keys and values, gate with up
    for work in (
        [(0, PROMPTS[0]), (1, PROMPTS[1][:20])],
        [(0, [7]), (1, PROMPTS[1][20:]), (2, PROMPTS[2])],
        [(seq, [9]) for seq in range(3)],
    ):
        a, b = (
            loop.step([(seq, list(ids)) for seq, ids in work], [seq for seq, _ in work])
            for loop in (one, two)
        )
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)


def test_layers_that_are_not_known_are_quantized_too(monkeypatch) -> None:
    monkeypatch.setattr("pdbatch.engine.merged.merge", lambda model, each=None: 0)
    model = make("llama")
    plain, narrow = copy.deepcopy(model), loaded(model)
    count = _round_in_place(plain, 4)
    quantizer = Quantizer("wint4", CPU)
    quantizer.model(narrow.model)
    assert quantizer.count == count + 1 == 3 * 7 + 1
    a, b = (Loop(one).step([(0, list(PROMPTS[1]))], [0]) for one in (loaded(plain), narrow))
    torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_and_its_sum_into_a_residual(bits: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 200), torch.randn(24)
    x, old = torch.randn(1, 5, 200), torch.randn(1, 5, 24)
    layer = QuantizedLinear(weight, bias, bits)
    want = x @ rounded(weight, bits).numbers(200).T + bias
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-4)
    residual = old.clone()
    assert layer.add_into(residual, x, 0.5) is residual
    torch.testing.assert_close(residual, old + 0.5 * want, rtol=1e-5, atol=1e-4)
    assert layer.q.nbytes == 24 * 256 * bits // 8


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_is_refused_untouched(family: str) -> None:
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="mixture of experts"):
        Quantizer("wint8", CPU).model(loaded(model).model)
    assert before.keys() == model.state_dict().keys()


def test_a_model_in_memory_is_not_quantized(tmp_path) -> None:
    model = loader.load("random:tiny", str(tmp_path), "cpu")
    with pytest.raises(ConfigError, match="in memory already"):
        LLM(model, home=tmp_path, quantization="wint8")


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match="wint8 or wint4"):
        EngineConfig(model="random:tiny", home="unused", quantization="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(BITS))
def test_an_engine_of_quantized_weights_answers_and_says_so(kind, tmp_path) -> None:
    llm = LLM("random:tiny", home=tmp_path, quantization=kind, device="cpu", num_blocks=64)
    again = LLM("random:tiny", home=tmp_path, quantization=kind, device="cpu", num_blocks=64)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, second = (
        [output.outputs[0].token_ids for output in one.generate(PROMPTS, sampling)]
        for one in (llm, again)
    )
    assert first == second
    assert all(len(ids) == 8 for ids in first)


def test_kv_of_other_weights_has_another_fingerprint(tmp_path) -> None:
    layouts = set()
    for kind in (None, *BITS):
        model = loader.load("random:tiny", str(tmp_path), "cpu", quantization=kind)
        shape = part.runner.kv_shape(model, 16)
        layouts.add(part.kv_layout(model, shape).fingerprint)
        named = dataclasses.replace(model, quantization=None)
        plain = part.kv_layout(named, shape).fingerprint
        assert (plain in layouts) == (kind is None or len(layouts) > 1)
    assert len(layouts) == 3
