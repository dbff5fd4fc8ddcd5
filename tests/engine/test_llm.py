"""`LLM`: outputs in order, errors beside them, and what a request may ask for."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from pdbatch import LLM, SamplingParams
from pdbatch.errors import ConfigError, UsageError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_models.loaded(tiny_models.make("llama")), block_size=8, num_blocks=60)


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [list(range(3, 4 + size)) for size in (50, 1, 20, 7)]
    seen: list[tuple[int, int]] = []
    outputs = llm.generate(prompts, GREEDY, progress=lambda *now: seen.append(now))
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
    assert seen[-1] == (4, 4)
    assert llm.generate(prompts[2], GREEDY)[0].outputs == outputs[2].outputs
    llm.engine.check()


def test_a_wrong_prompt_becomes_an_error_beside_the_others(llm: LLM) -> None:
    good = [5, 6, 7]
    outputs = llm.generate([good, "text", [500], [4] * 481, [3] * 400, good], GREEDY)
    codes = [output.error.code if output.error else None for output in outputs]
    long = "context_length_exceeded"
    assert codes == [None, "invalid_request", "invalid_request", long, None, None]
    assert outputs[2].error.param == "body.prompt_token_ids"
    (too_much,) = llm.generate(good, SamplingParams(max_tokens=1000))
    assert too_much.error.code == long and "lower max_tokens" in too_much.error.message


def test_logprobs_n_and_stop_tokens(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, logprobs=2, ignore_eos=True)
    (output,) = llm.generate([9, 8, 7], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    for completion in output.outputs:
        assert len(completion.logprobs) == len(completion.token_ids) == 8
        assert all(len(position.top) == 2 for position in completion.logprobs)
        chosen = [position.chosen.token_id for position in completion.logprobs]
        assert chosen == completion.token_ids
    assert output.usage.completion_tokens == 24 and output.usage.prompt_tokens == 3
    again = llm.generate([[9, 8, 7], [1, 2]], params)
    assert [c.token_ids for c in again[0].outputs] == [c.token_ids for c in output.outputs]
    third = output.outputs[0].token_ids[2]
    stopping = SamplingParams(seed=5, max_tokens=8, stop_token_ids=(third,), ignore_eos=True)
    (stopped,) = llm.generate([9, 8, 7], stopping)
    completion = stopped.outputs[0]
    assert completion.finish_reason == "stop" and completion.stop_reason == third
    assert completion.token_ids[-1] == third and len(completion.token_ids) <= 3


def test_min_tokens_keeps_ends_away(llm: LLM) -> None:
    everything = tuple(range(199))
    params = SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=everything[2:100])
    for output in llm.generate([[5, 6, 7]] * 5, params):
        assert len(output.outputs[0].token_ids) > 4


def test_a_shared_prefix_is_computed_once(llm: LLM) -> None:
    prefix = [11] * 64
    outputs = llm.generate([[*prefix, 20 + i] for i in range(6)], GREEDY)
    assert [output.usage.cached_tokens for output in outputs] == [0, 64, 64, 64, 64, 64]


def test_misuse_is_named(llm: LLM) -> None:
    with pytest.raises(UsageError, match="not a list of <class 'float'>"):
        llm.generate([[1, 2], [0.5]])
    with pytest.raises(UsageError, match="2 prompts, but 1"):
        llm.generate([[1], [2]], [GREEDY])
    with pytest.raises(ConfigError, match="power of two"):
        LLM(tiny_models.loaded(tiny_models.make("llama")), block_size=7)
    with pytest.raises(ConfigError, match="no room for a block"):
        LLM(tiny_models.loaded(tiny_models.make("llama")), kv_cache_bytes=10)
