"""The runner against transformers' own generate, family by family."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, Loop, loaded, make

from pdbatch.engine import runner
from pdbatch.errors import ModelError

OUT = 12


def _prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (5, 61, 1, 33, 90, 16, 8)]


def _reference(model, prompts: list[list[int]]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=OUT,
            max_new_tokens=OUT,
            pad_token_id=0,
            eos_token_id=None,
        )
        found.append(tokens[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    model = make(family)
    prompts = _prompts(len(family))
    expected = _reference(model, prompts)
    assert len({tuple(tokens) for tokens in expected}) > 3, "the model answers all alike"
    engine = loaded(model)
    for chunk in (7, 1000):
        assert Loop(engine).generate(prompts, OUT, chunk) == expected
    assert Loop(engine, block_size=4, num_blocks=200).generate(prompts, OUT, 19) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_tokens_of_generate(family: str) -> None:
    model = make(family)
    prompts = _prompts(len(family))
    expected = _reference(model, prompts)
    assert Loop(loaded(model, "cuda")).generate(prompts, OUT, 19) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_sequence_alone_and_among_others_has_the_same_logits(family: str) -> None:
    engine = loaded(make(family))
    prompts = _prompts(3)
    alone, among = Loop(engine), Loop(engine)
    first = alone.step([(1, prompts[1])], [1])
    mixed = among.step([(s, list(prompt)) for s, prompt in enumerate(prompts)], [1])
    torch.testing.assert_close(first, mixed, rtol=1e-4, atol=1e-4)
    first = alone.step([(1, [5])], [1])
    mixed = among.step([(s, [5]) for s in range(len(prompts))], [1])
    torch.testing.assert_close(first, mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_blocks_that_sequences_share_are_read_rightly(family: str) -> None:
    """Two prompts, each begun by several sequences over the same blocks, and one on its own."""
    model = make(family)
    first, second, other = [[t + n for t in range(3, 83)] for n in (0, 40, 90)]
    prompts = [[*first, n, 5] for n in range(4, 10)] + [[*second, n] for n in range(4, 9)]
    prompts = [*prompts, other, first[:70], first + [9] * 30]
    expected = _reference(model, prompts)
    loop = Loop(loaded(model), num_blocks=300)
    outputs: list[list[int]] = [[] for _ in prompts]
    for seq, prompt in enumerate(prompts):  # 80 tokens are 10 blocks of 8
        owner = next((o for o in range(seq) if prompts[o][:80] == prompt[:80]), None)
        if owner is not None and len(prompt) > 80:
            loop.tables[seq], loop.done[seq] = loop.tables[owner][:10], 80
        piece = prompt[loop.done.get(seq, 0) :]
        outputs[seq].append(int(loop.step([(seq, piece)], [seq]).argmax()))
    everyone = list(range(len(prompts)))
    while len(outputs[0]) < OUT:
        logits = loop.step([(seq, outputs[seq][-1:]) for seq in everyone], everyone)
        for seq, token in enumerate(logits.argmax(-1).tolist()):
            outputs[seq].append(token)
    assert outputs == expected


def test_a_step_without_wanted_logits_gives_none() -> None:
    loop = Loop(loaded(make("llama")))
    assert loop.step([(0, [3, 4, 5])], []).shape == (0, VOCAB)


def test_old_numbers_in_a_block_are_never_seen() -> None:
    engine = loaded(make("llama"))
    prompt = _prompts(5)[3]
    expected = Loop(engine).generate([prompt, prompt[:9]], OUT, 1000)
    loop = Loop(engine)
    loop.cache.pool.fill_(float("inf"))
    assert loop.generate([prompt, prompt[:9]], OUT, 1000) == expected


def test_warmup_runs_on_the_smallest_blocks() -> None:
    engine = loaded(make("llama"))
    for size in (1, 2, 16):
        Loop(engine, block_size=size).runner.warmup()


def test_a_family_that_does_not_pass_the_step_on_is_refused() -> None:
    with pytest.raises(ModelError, match="StableLmAttention does not pass the step on") as caught:
        runner.kv_shape(loaded(make("stablelm")), 16)
    assert caught.value.remedy


def test_kv_shape_is_what_the_layers_write() -> None:
    shape = runner.kv_shape(loaded(make("qwen3")), 16)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (3, 2, 16)
    assert shape.block_bytes == 3 * 2 * 16 * 2 * 16 * 4


def test_a_model_whose_layers_differ_is_refused() -> None:
    model = make("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(64, 64, bias=False)
    attention.v_proj = torch.nn.Linear(64, 64, bias=False)
    with pytest.raises(ModelError, match="differ in their KV heads") as caught:
        runner.kv_shape(loaded(model), 16)
    assert caught.value.remedy


def test_a_model_that_does_not_attend_in_every_layer_is_refused() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 2
    engine = loaded(model)
    model.config.num_hidden_layers = 3
    engine.config.num_hidden_layers = 4
    with pytest.raises(ModelError, match="3 of the model's 4 layers"):
        runner.kv_shape(engine, 16)
