"""The GPU's runner: graphs against eager steps, and both against the runner of every device.

What needs no device (the head, the ladder) is tested everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import random
from itertools import pairwise

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, Loop, loaded, make

from pdbatch import LLM, SamplingParams

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton on this machine", allow_module_level=True)

from pdbatch.engine import peak
from pdbatch.engine.gpu_runner import GpuRunner, Head, prepare_model
from pdbatch.engine.graphs import ladder
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.memory import release_unused, taken_by
from pdbatch.engine.runner import kv_shape
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.sizing import Sizes

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def on_gpu(family: str, dtype=torch.float32, **sizes):
    """A model's GPU engine; its float32 or bfloat16 weights are those of `make(family)`."""
    model = make(family, **sizes).to(dtype)
    return dataclasses.replace(loaded(model, "cuda"), dtype=dtype)


def prompts(seed: int, count: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_is_the_rest_of_the_model(family: str) -> None:
    model = make(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        parts = Head(model)(hidden)
    torch.testing.assert_close(parts, whole)
    assert model.base_model is not Head(model)._given


def test_the_ladder_ends_at_the_most() -> None:
    assert ladder(1) == [1] and ladder(3) == [1, 2, 3] and ladder(8) == [1, 2, 4, 8]
    for most in (40, 256, 500, 512, 1000):
        rungs = ladder(most)
        assert rungs[-1] == most and rungs == sorted(set(rungs))
        assert all(b - a <= max(8, a // 4) for a, b in pairwise(rungs))


def _gpu_loop(engine, num_blocks: int = 300, **options) -> Loop:
    engine = dataclasses.replace(engine, model=copy.deepcopy(engine.model))
    prepare_model(engine)
    loop = Loop(engine, num_blocks=num_blocks)
    loop.runner = GpuRunner(engine, loop.cache, max_num_seqs=64, max_model_len=512, **options)
    return loop


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_are_those_of_plain_torch(self, family: str) -> None:
        engine = on_gpu(family)
        loops = [
            Loop(engine, num_blocks=300),
            _gpu_loop(engine),
            _gpu_loop(engine, cuda_graphs=False),
        ]
        work = list(enumerate(prompts(len(family), 7)))
        wanted = list(range(7))
        for _step in range(3):
            logits = [loop.step([(s, list(ids)) for s, ids in work], wanted) for loop in loops]
            for got in logits[1:]:
                torch.testing.assert_close(got, logits[0], rtol=1e-3, atol=1e-3)
            work = [(s, [int(token)]) for s, token in enumerate(logits[0].argmax(-1))]
        assert loops[1].runner._graphs.count == 1

    @pytest.mark.parametrize("family", ["cohere", "olmo"])
    def test_compiled_layers_answer_as_plain_torch(self, family: str) -> None:
        engine = on_gpu(family)
        plain = Loop(engine, num_blocks=300)
        ours = _gpu_loop(engine, compiled=True)
        ours.runner.warmup()
        assert ours.runner._compiled._count == 3 and ours.runner._graphs.count > 3
        work = list(enumerate(prompts(6, 7)))
        for _step in range(3):
            logits = [
                loop.step([(s, list(ids)) for s, ids in work], list(range(7)))
                for loop in (plain, ours)
            ]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
            work = [(s, [int(token)]) for s, token in enumerate(logits[0].argmax(-1))]

    def test_graphs_of_many_sizes_and_kinds(self) -> None:
        engine = on_gpu("llama")
        plain, graphs = Loop(engine, num_blocks=900), _gpu_loop(engine, 900)
        rng = random.Random(4)
        prefix = [rng.randrange(3, VOCAB) for _ in range(320)]
        firsts = [[*prefix, rng.randrange(3, VOCAB)] for _ in range(9)] + prompts(5, 21, 300)
        for loop in (plain, graphs):
            for seq, prompt in enumerate(firsts):
                if 0 < seq < 9:  # the blocks of the first
                    loop.tables[seq], loop.done[seq] = loop.tables[0][:40], 320
                loop.step([(seq, prompt[loop.done.get(seq, 0) :])], [seq])
        for picked in (range(30), range(9), range(12, 30), range(3), range(30), [20], range(8, 11)):
            work = [(seq, [rng.randrange(3, VOCAB)]) for seq in picked]
            wanted = [seq for seq, _ in work]
            a = plain.step(list(work), wanted)
            b = graphs.step(list(work), wanted)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert {kind for _rows, kind in graphs.runner._graphs._graphs} >= {"split", "shared"}

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    def test_a_request_alone_and_among_256(self, family: str) -> None:
        engine = on_gpu(family)
        asked = prompts(8, 256)
        llm = LLM(engine, num_blocks=4000, block_size=16, max_num_seqs=256)
        among = llm.generate(asked, GREEDY)
        for at in (0, 17, 200):
            (alone,) = llm.generate(asked[at], GREEDY)
            assert alone.outputs[0].token_ids == among[at].outputs[0].token_ids
        llm.engine.check()

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
    def test_half_precision_answers_as_transformers(self, family: str) -> None:
        """Greedy tokens are those of eager; where not, the two best are within bf16 rounding."""
        model = make(family).to(torch.bfloat16)
        asked = prompts(9, 24)
        engine = dataclasses.replace(loaded(copy.deepcopy(model), "cuda"), dtype=torch.bfloat16)
        outputs = LLM(engine, num_blocks=2000, max_num_seqs=16).generate(asked, GREEDY)
        model = model.to("cuda")
        for prompt, output in zip(asked, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            ids = torch.tensor([prompt + tokens], device="cuda")
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            best = logits.amax(-1)
            ours = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
            scale = logits.abs().amax(-1)
            assert ((best - ours) <= scale * 2**-5).all(), f"{(best - ours).max()}"

    def test_a_measured_step_is_what_steps_take(self) -> None:
        model = on_gpu("llama", torch.bfloat16)
        prepare_model(model)
        shape = kv_shape(model, 16)
        small = Sizes(max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=128)
        large = Sizes(max_num_seqs=256, max_num_batched_tokens=65536, max_model_len=512)
        one, other = peak.measured(model, shape, small), peak.measured(model, shape, large)
        assert one is not None and other is not None and one < other
        sampler = Sampler(model.vocab_size, model.device)
        cache = PagedKVCache(shape, 1, model.device)
        again = GpuRunner(model, cache, max_num_seqs=256, max_model_len=512, cuda_graphs=False)
        taken = taken_by(lambda: peak.run(again, sampler, large, 16), model.device)
        assert taken <= other * 1.1 + (32 << 20)

    def test_a_capture_without_memory_leaves_steps_as_they_are(self) -> None:
        engine = on_gpu("llama")
        loops = [_gpu_loop(engine, cuda_graphs=False), _gpu_loop(engine)]
        graphs = loops[1].runner._graphs
        run = graphs._run

        def starved(step):
            if torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(step)

        graphs._run = starved
        work = list(enumerate(prompts(3, 7)))
        for _step in range(3):
            one, other = (
                loop.step([(s, list(ids)) for s, ids in work], list(range(7))) for loop in loops
            )
            torch.testing.assert_close(other, one)
            work = [(s, [int(token)]) for s, token in enumerate(one.argmax(-1))]
        assert graphs.count == 0 and graphs._full

    def test_steps_that_find_no_memory_give_the_same_tokens(self) -> None:
        engine = on_gpu("llama", intermediate_size=2048)
        llm = LLM(engine, num_blocks=2000, max_num_seqs=64, max_num_batched_tokens=8192)
        asked = prompts(5, 120)
        told = [output.outputs[0].token_ids for output in llm.generate(asked, GREEDY)]
        llm.engine._blocks.pool.forget_all()
        release_unused()
        total = torch.cuda.mem_get_info()[1]
        share = (torch.cuda.memory_reserved() + (24 << 20)) / total
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            again = llm.generate(asked, GREEDY)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert [output.outputs[0].token_ids for output in again] == told
        assert llm.engine.scheduler.max_num_batched_tokens < 8192, "memory did run out"
        llm.engine.check()
