"""Products with weights of 8 and 4 bits: the kernels against float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from triton_machine import DEVICE, GPU, marks

from pdbatch.engine import loader
from pdbatch.engine.kernels import narrow, widening
from pdbatch.engine.llm import LLM
from pdbatch.engine.quantization.convert import Quantization
from pdbatch.engine.quantization.cuts import Tiles
from pdbatch.engine.quantization.linear import QuantizedLinear
from pdbatch.engine.quantization.packed import pack
from pdbatch.engine.quantization.rounding import rounded
from pdbatch.sampling import SamplingParams

pytestmark = [*marks, pytest.mark.parametrize("bits", [8, 4])]
SHAPES = [(64, 256, 1, 1), (192, 640, 5, 2), (100, 300, 16, 3), (64, 1024, 40, 4)]
"""Outputs, inputs, rows, shares."""


def _made(outputs: int, inputs: int, rows: int, bits: int):
    torch.manual_seed(outputs + inputs)
    one = rounded(torch.randn(outputs, inputs), bits)
    x = torch.randn(rows, inputs).bfloat16()
    want = x.double() @ one.numbers(inputs).double().T
    return x.to(DEVICE), [part.to(DEVICE) for part in pack(one)], want, one


def _product(x, packed, out, tiles, **how) -> None:
    arrived = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    narrow.product(x, *packed, out, tiles, arrived, **how)
    assert arrived.count_nonzero() == 0


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product(shape: tuple[int, int, int, int], swap: bool, bits: int) -> None:
    outputs, inputs, rows, shares = shape
    x, packed, want, _ = _made(outputs, inputs, rows, bits)
    tiles = Tiles(rows=16, outputs=64, shares=shares, swap=swap)
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=DEVICE)
    _product(x, packed, out, tiles)
    close = {"rtol": 1e-2, "atol": 1e-2 * inputs**0.5}
    torch.testing.assert_close(out.cpu().double(), want, **close)
    assert (out.cpu().double() - want).std() < 4e-3 * want.std()


def test_bias_and_sum_into_what_is_there(bits: int) -> None:
    x, packed, want, _ = _made(64, 256, 3, bits)
    bias, old = (torch.randn(n, 64, device=DEVICE).bfloat16() for n in (1, 3))
    out = old.clone()
    tiles = Tiles(rows=16, outputs=64, shares=2, swap=False)
    _product(x, packed, out, tiles, bias_N=bias[0], alpha=0.5)
    want = old.cpu().double() + 0.5 * (want + bias.cpu().double())
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-2, atol=5e-2)


def test_a_row_gives_the_same_whatever_the_others_are(bits: int) -> None:
    x, packed, _, _ = _made(64, 512, 16, bits)
    tiles = Tiles(rows=16, outputs=64, shares=2, swap=False)
    out = torch.empty(16, 64, dtype=torch.bfloat16, device=DEVICE)
    _product(x, packed, out, tiles)
    for row in (0, 9):
        alone = torch.empty(1, 64, dtype=torch.bfloat16, device=DEVICE)
        _product(x[row : row + 1], packed, alone, tiles)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("shape", [(64, 256), (100, 300)])
def test_widening(shape: tuple[int, int], bits: int) -> None:
    outputs, inputs = shape
    _, packed, _, one = _made(outputs, inputs, 1, bits)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(outputs, inputs, dtype=dtype, device=DEVICE)
        widening.widen(*packed, out)
        want = one.numbers(inputs).to(dtype)
        torch.testing.assert_close(out.cpu(), want, rtol=8e-3, atol=0)
        some = torch.empty(21, inputs, dtype=dtype, device=DEVICE)
        widening.widen(*packed, some, 32)
        assert torch.equal(some, out[32:53])


@pytest.mark.skipif(not GPU, reason="a GPU's graphs are needed")
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 300])
def test_a_layer_in_a_captured_graph(rows: int, bits: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(1000, 900).cuda().bfloat16(), torch.randn(1000).cuda().bfloat16()
    layer = QuantizedLinear(weight, bias, bits)
    x, old = (torch.zeros(1, rows, size).cuda().bfloat16() for size in (900, 1000))
    layer.add_into(old, x, 1.0), layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
        layer.add_into(old, x, 0.5)
    for _ in range(3):
        x.normal_()
        before = old.normal_().double()
        graph.replay()
        want = x.double() @ rounded(weight, bits).numbers(900).double().T + bias.double()
        close = {"rtol": 2e-2, "atol": 2e-2 * 30}
        torch.testing.assert_close(out.double(), want, **close)
        torch.testing.assert_close(old.double(), before + 0.5 * want, **close)
        assert (out.double() - want).std() < 5e-3 * want.std()
    assert layer.arrived.count_nonzero() == 0


@pytest.mark.skipif(not GPU, reason="an engine on a GPU is needed")
def test_an_engine_on_a_gpu_answers_as_with_rounded_weights(bits: int, tmp_path) -> None:
    """Prompts of many rows, decodes of few, graphs. Roundings of sums may part some answers."""
    kind: Quantization = "wint8" if bits == 8 else "wint4"
    rng = random.Random(bits)
    prompts = [[rng.randrange(3, 500) for _ in range(rng.randrange(1, 90))] for _ in range(16)]
    plain = loader.load("random:tiny", str(tmp_path), "cuda", "bfloat16")
    network: Any = plain.model
    for module in network.base_model.layers.modules():
        if type(module) is torch.nn.Linear:
            weight = rounded(module.weight.data, bits).numbers(module.in_features)
            module.weight.data = weight.bfloat16()
    head = network.get_output_embeddings()
    head.weight.data = rounded(head.weight.data, 8).numbers(head.in_features).bfloat16()
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    found = []
    for model, quantization in ((plain, None), ("random:tiny", kind)):
        sizes: dict[str, Any] = {"num_blocks": 256, "max_num_seqs": 16, "max_model_len": 128}
        llm = LLM(model, home=tmp_path, device="cuda", quantization=quantization, **sizes)
        outputs = llm.generate(prompts, sampling)
        found.append([tuple(output.outputs[0].token_ids) for output in outputs])
    equal = sum(one == other for one, other in zip(*found, strict=True))
    assert equal >= 12, found
