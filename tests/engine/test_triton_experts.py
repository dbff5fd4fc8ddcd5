"""Experts' kernels against float64 by the book, and whole mixtures against transformers' own."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import VOCAB, Loop, loaded, make
from triton_machine import DEVICE, GPU, marks

from pdbatch.engine import compiled, experts
from pdbatch.engine.kernels import experts as kernels
from pdbatch.engine.kernels.activation import KINDS
from pdbatch.engine.merged.facts import activation

pytestmark = marks
ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(ERROR) if GPU else [torch.float32, torch.bfloat16]
MIXTURES = ["mixtral", "qwen3_moe", "ernie4_5_moe"]


def _by_the_book(x_TC, ids_TK, scores_TK, gate_up, down, kind: str) -> torch.Tensor:
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[kind]
    out = torch.zeros_like(x_TC, dtype=torch.float64)
    for token in range(x_TC.shape[0]):
        for expert, score in zip(ids_TK[token].tolist(), scores_TK[token].double(), strict=True):
            gate, up = (gate_up[expert].double() @ x_TC[token].double()).chunk(2)
            out[token] += score * (down[expert].double() @ (act(gate) * up))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",  # tokens, experts, experts of each, width, inner width
    [(1, 4, 2, 64, 32), (7, 3, 1, 48, 40), (33, 8, 3, 80, 100)]
    + ([(64, 128, 8, 2048, 768), (900, 16, 4, 512, 256)] if GPU else []),
)
def test_against_float64(sizes: tuple[int, ...], dtype) -> None:
    count, num, each, width, inner = sizes
    seed = random.randrange(2**31)
    torch.manual_seed(seed)
    x = torch.randn(count, width, dtype=dtype)
    ids = torch.stack([torch.randperm(num)[:each] for _ in range(count)])
    ids[: count // 2] = torch.arange(each)  # some experts get most, and some nothing
    scores = torch.rand(count, each)
    gate_up = torch.randn(num, 2 * inner, width).mul_(width**-0.5).to(dtype)
    down = torch.randn(num, width, inner).mul_(inner**-0.5).to(dtype)
    kind = list(KINDS)[seed % len(KINDS)]
    wanted = _by_the_book(x, ids, scores, gate_up, down, kind)
    got = kernels.experts(*(part.to(DEVICE) for part in (x, ids, scores, gate_up, down)), kind)
    error = ((got.cpu().double() - wanted).abs().max() / wanted.abs().max()).item()
    assert error < ERROR[dtype], f"seed {seed}, {kind}: {error:.2e}"


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Within one number of rows a turn, a token's answer is the same alone and in company."""
    torch.manual_seed(3)
    x, scores = torch.randn(6, 64, device=DEVICE), torch.rand(6, 2, device=DEVICE)
    ids = torch.tensor([[0, 1], [1, 2], [0, 3], [3, 1], [2, 0], [1, 0]], device=DEVICE)
    gate_up = torch.randn(4, 64, 64, device=DEVICE)
    down = torch.randn(4, 64, 32, device=DEVICE)
    among = kernels.experts(x, ids, scores, gate_up, down, "silu")
    for token in range(6):
        part = slice(token, token + 1)
        alone = kernels.experts(x[part], ids[part], scores[part], gate_up, down, "silu")
        assert torch.equal(alone[0], among[token])


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_answer_as_without(family: str) -> None:
    plain = loaded(make(family), DEVICE)
    ours = loaded(make(family), DEVICE)
    layers = ours.config.num_hidden_layers - (family == "ernie4_5_moe")
    assert experts.use(ours.model) == layers
    loops = [Loop(plain, num_blocks=40), Loop(ours, num_blocks=40)]
    rng = random.Random(family)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(count)] for count in (9, 1, 4)]
    work = list(enumerate(prompts))
    for _step in range(2):
        logits = [loop.step([(s, list(ids)) for s, ids in work], [0, 1, 2]) for loop in loops]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        work = [(s, [int(row.argmax())]) for s, row in enumerate(logits[0])]


def test_what_is_no_plain_mixture_stays() -> None:
    assert experts.use(make("llama")) == 0
    odd = make("mixtral")
    for layer in odd.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Tanh()
    assert activation(torch.nn.Tanh()) is None and experts.use(odd) == 0


def test_half_precision_with_many_rows_goes_the_other_way() -> None:
    model = make("mixtral").to(torch.bfloat16)
    assert experts.use(model) == 3
    module = model.model.layers[0].mlp.experts
    took = []
    few = 4 * experts._FEW_ROWS // 2
    original = kernels.experts
    try:
        kernels.experts = lambda *args: took.append(args) or args[0]
        for count in (few, few + 1):
            x = torch.randn(count, 64, dtype=torch.bfloat16)
            ids = torch.zeros(count, 2, dtype=torch.int64)
            module(x, ids, torch.ones(count, 2))
    finally:
        kernels.experts = original
    assert [args[0].shape[0] for args in took] == [few]


def test_a_compiled_layer_meets_the_experts_as_an_operator() -> None:
    """A mixture whose layers are not merged."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2}
    plain, ours = (loaded(make("olmoe", **sizes), DEVICE) for _ in range(2))
    assert experts.use(ours.model) == 3
    layers = compiled.Compiled(ours.model, backend="aot_eager")
    loops = [Loop(plain, num_blocks=40), Loop(ours, num_blocks=40)]
    ids = [5, 17, 140, 60, 9]

    def step(tokens: list[int]) -> None:
        logits = [loop.step([(0, list(tokens))], [0]) for loop in loops]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)

    assert layers.tried(lambda: step(ids))
    step([7])
