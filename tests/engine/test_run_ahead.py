"""A step ahead of its tokens: the same outputs, in an order that keeps the device busy."""

from __future__ import annotations

import random

import pytest
import torch
from engine_fakes import FakeEngine, make_engine
from tiny_models import VOCAB, loaded, make

from pdbatch import LLM, SamplingParams
from pdbatch.engine.messages import Abort, EngineRequest, Finished, Submit
from pdbatch.engine.pending import put_tokens
from pdbatch.request import RequestSpec

KINDS = [
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02, "n": 2, "seed": 4},
    {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.2, "seed": 5},
    {"temperature": 0, "logprobs": 2, "stop_token_ids": tuple(range(9))},
    {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": tuple(range(60))},
]


def request(key: str, prompt: int, most: int, **params) -> EngineRequest:
    sampling = SamplingParams(max_tokens=most, ignore_eos=True, **params)
    ids = tuple((sum(key.encode()) + i) % 49 for i in range(prompt))
    return EngineRequest(key=key, spec=RequestSpec(prompt_token_ids=ids, sampling=sampling))


def ended(fake: FakeEngine, most_steps: int = 300) -> dict[str, list[int]]:
    """Step until idle; the first output of each result."""
    tokens = {}
    for _ in range(most_steps):
        for event in fake.engine.step():
            assert isinstance(event, Finished)
            tokens |= {output.key: list(output.outputs[0].token_ids) for output in event.outputs}
        fake.engine.check()
        if not fake.engine.busy:
            return tokens
    raise AssertionError(f"still busy: {fake.engine.stats()}")


@pytest.mark.parametrize("kinds", [KINDS[:1], [*KINDS[:3], KINDS[5]], KINDS])
def test_a_model_answers_the_same_ahead_and_in_step(kinds: list[dict]) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = make("llama")
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 50))] for _ in range(24)]
    params = [
        SamplingParams(max_tokens=rng.randrange(6, 24), **kinds[i % len(kinds)]) for i in range(24)
    ]
    told = []
    for ahead in (False, True):
        llm = LLM(loaded(model), num_blocks=40, block_size=8, max_num_seqs=8, run_ahead=ahead)
        outputs = llm.generate(prompts, params)
        llm.engine.check()
        assert llm.engine.stats().used_blocks == 0 and not llm.engine._stepper.flights
        told.append([o for out in outputs for o in out.outputs])
    for one, other in zip(*told, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        if one.logprobs is not None:
            a, b = ([p.chosen.logprob for p in o.logprobs] for o in (one, other))
            assert a == pytest.approx(b, abs=1e-4), "batches differ, so roundings do"


def test_a_step_is_launched_before_the_tokens_of_the_last_are_looked_at() -> None:
    fake = make_engine(run_ahead=True)
    seen: list[str] = []
    execute, retire = fake.model.execute, fake.engine._stepper.retire

    def launched(batch):
        seen.append("launched")
        return execute(batch)

    def retired():
        seen.append("retired")
        return retire()

    fake.model.execute = launched
    fake.engine._stepper.retire = retired
    fake.engine.handle(Submit([request("a", 5, 4)]))
    ended(fake)
    assert seen == ["launched", *["launched", "retired"] * 3, "retired"]


def test_who_is_in_its_last_step_has_left_its_place() -> None:
    fake = make_engine(run_ahead=True, max_num_seqs=2)
    seen: list[str] = []
    execute, retire = fake.model.execute, fake.engine._stepper.retire

    def launched(batch):
        seen.append(f"{batch.num_decodes}+{len(batch.context_lens) - batch.num_decodes}")
        return execute(batch)

    def retired():
        seen.append("-")
        return retire()

    fake.model.execute = launched
    fake.engine._stepper.retire = retired
    fake.engine.handle(Submit([request(key, 5, 3) for key in "abcd"]))
    assert len(ended(fake)) == 4
    start, decode = ["0+2", "-"], ["2+0", "-"]
    assert seen == ["0+2", *decode * 2, *start, *decode * 2, "-"], "never idle"


def test_nothing_runs_ahead_of_penalties() -> None:
    fake = make_engine(run_ahead=True)
    most = 0

    def launched(batch):
        nonlocal most
        most = max(most, len(fake.engine._stepper.flights))
        return execute(batch)

    execute = fake.model.execute
    fake.model.execute = launched
    fake.engine.handle(Submit([request("a", 5, 9, frequency_penalty=0.1)]))
    assert len(ended(fake)["a"]) == 9
    assert most == 0, "each step was retired before the next"


def test_a_token_too_many_is_dropped_and_its_blocks_go_back_later() -> None:
    fake = make_engine(run_ahead=True, block_size=1)
    whole = make_engine()
    whole.engine.handle(Submit([request("a", 5, 20)]))
    tokens = ended(whole)["a"]
    stop = tokens[7]
    fake.engine.handle(Submit([request("a", 5, 20, stop_token_ids=(stop,))]))
    outputs: list[list[int]] = []
    held = []
    while fake.engine.busy:
        for event in fake.engine.step():
            outputs += [list(output.outputs[0].token_ids) for output in event.outputs]
            held.append(fake.engine.stats().used_blocks)
        fake.engine.check()
    assert outputs == [tokens[: tokens.index(stop) + 1]]
    assert held == [0], "the step in flight had nobody else in it: it was retired at once"


def test_an_abort_leaves_blocks_with_the_step_in_flight() -> None:
    fake = make_engine(run_ahead=True)
    fake.engine.handle(Submit([request("a", 9, 20), request("b", 9, 20)]))
    for _ in range(3):
        fake.engine.step()
    before = fake.engine.stats().used_blocks
    fake.engine.handle(Abort(["a"]))
    fake.engine.check()
    assert fake.engine.stats().used_blocks == before
    fake.engine.step()
    assert fake.engine.stats().used_blocks < before
    assert ended(fake).keys() == {"b"}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("place", ["execute", "choose", "fetch"])
def test_after_a_failed_step_all_is_computed_again(place: str, ahead: bool) -> None:
    fake, sound = make_engine(run_ahead=ahead), make_engine()
    asked = [request("a", 9, 12), request("b", 3, 12), request("c", 5, 8, n=2)]
    sound.engine.handle(Submit(asked))
    wanted = ended(sound)
    fake.engine.handle(Submit(asked))
    for _ in range(5):
        fake.engine.step()

    def fails(*_args, **_options):
        raise MemoryError(place)

    where = fake.engine._stepper if place == "fetch" else fake.model
    name = "retire" if place == "fetch" else place
    works = getattr(where, name)
    setattr(where, name, fails)
    with pytest.raises(MemoryError):
        fake.engine.step()
    setattr(where, name, works)
    fake.engine.check()
    assert fake.engine.stats().running == 0 and fake.engine.stats().used_blocks == 0
    fake.model.unfinished.clear()
    assert ended(fake) == wanted


def test_pending_tokens_are_put_in_their_places() -> None:
    ids = torch.tensor([7, -1, 0, -3, -2], dtype=torch.int32)
    put_tokens(ids, torch.tensor([40, 41, 42]))
    assert ids.tolist() == [7, 40, 0, 42, 41]
    put_tokens(ids, None)
    assert ids.tolist() == [7, 40, 0, 42, 41]


def test_what_ran_on_a_wrong_guess_does_not_count() -> None:
    """The step that had it is not taken for the sequence's, and its slot is written again."""
    fake, sound = make_engine(run_ahead=True, guesses=True), make_engine()
    asked = [request(key, 5 + at, 30) for at, key in enumerate("abcdef")]
    wanted, told = [], []
    for engine, outputs in ((sound, wanted), (fake, told)):
        engine.engine.handle(Submit(asked))
        outputs.append(ended(engine))
    assert wanted == told
    assert fake.engine.stats().steps > sound.engine.stats().steps
    again = [request(key, 5 + at, 30) for at, key in enumerate("abcdef")]
    fake.engine.handle(Submit(again))
    assert [ended(fake)] == wanted, "nothing wrong is found in the cache"
