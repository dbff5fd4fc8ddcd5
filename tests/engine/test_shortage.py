"""Steps that find no memory: every request ends right, and the engine goes on."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from engine_fakes import FakeEngine, expected_output, make_engine

from pdbatch.engine.memory import is_shortage
from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    EngineRequest,
    Finished,
    Prefilled,
    Reset,
    Submit,
)
from pdbatch.engine.rng import seed_from_key
from pdbatch.errors import EngineDied
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.sampling import SamplingParams


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Starved:
    """Makes a fake model raise at chosen places; counts how often it did."""

    def __init__(self, fake: FakeEngine) -> None:
        self.fake = fake
        self.raised = 0
        self.waited_s: list[float] = []
        self.released = 0
        self.at_launch: Callable[[int, int], bool] = lambda tokens, seqs: False
        """Whether a step of so many tokens of so many sequences finds no memory."""
        self.at_choice: Callable[[], bool] = lambda: False
        self.at_fetch: Callable[[], bool] = lambda: False
        model = fake.model
        self._execute, self._choose = model.execute, model.choose
        model.execute, model.choose = self.execute, self.choose
        remedies = fake.engine._shortage._remedies
        object.__setattr__(remedies, "wait", self.waited_s.append)
        object.__setattr__(remedies, "release", self.release)

    def release(self) -> None:
        self.released += 1

    def execute(self, batch):
        if self.at_launch(len(batch.input_ids_T), len(batch.context_lens)):
            self.fail()
        return self._execute(batch)

    def choose(self, logits, states, rows=None):
        if self.at_choice():
            # What the step wrote is in stream order before all that takes its blocks now.
            self.fake.model.unfinished.pop(self.fake.model.steps, None)
            self.fail()
        choice = self._choose(logits, states, rows)
        fetch = choice.fetch

        def starved():
            if self.at_fetch():
                self.fake.model.unfinished.clear()
                self.fail()
            return fetch()

        choice.fetch = starved
        return choice

    def fail(self) -> None:
        self.raised += 1
        raise out_of_memory()


def a_request(rng: random.Random, key: str, shared: list[int]) -> EngineRequest:
    prompt = shared[: rng.randrange(len(shared))] + [
        rng.randrange(49) for _ in range(rng.randrange(1, 20))
    ]
    sampling = SamplingParams(
        max_tokens=rng.randrange(1, 14), n=rng.choice([1, 1, 1, 3]), ignore_eos=rng.random() < 0.5
    )
    return EngineRequest(
        key=key, spec=RequestSpec(prompt_token_ids=tuple(prompt), sampling=sampling)
    )


def run(fake: FakeEngine, most_steps: int = 4000) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    for _ in range(most_steps):
        for event in fake.engine.step():
            assert isinstance(event, Finished)
            for output in event.outputs:
                assert output.key not in outputs, "ended twice"
                outputs[output.key] = output
        fake.engine.check()
        if not fake.engine.busy:
            assert fake.engine.stats().used_blocks == 0
            return outputs
    raise AssertionError(f"still busy: {fake.engine.stats()}")


def check_right(request: EngineRequest, output: RequestOutput) -> None:
    params = request.spec.sampling
    assert output.error is None, output.error
    for one in output.outputs:
        seed = seed_from_key(request.key)
        prompt = request.spec.prompt_token_ids
        want = expected_output(prompt, params, seed, one.index, params.max_tokens)
        assert list(one.token_ids) == want


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("attempt", range(6))
def test_answers_are_right_wherever_memory_runs_out(
    ahead: bool, guesses: bool, attempt: int
) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    blocks = rng.choice([24, 64])
    fake = make_engine(run_ahead=ahead, guesses=guesses, num_blocks=blocks, max_num_seqs=6)
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: rng.random() < 0.15
    starved.at_choice = lambda: rng.random() < 0.1
    starved.at_fetch = lambda: rng.random() < 0.15
    shared = [rng.randrange(49) for _ in range(30)]
    requests = [a_request(rng, f"r{at}", shared) for at in range(20)]
    fake.engine.handle(Submit(requests))
    outputs = run(fake)
    assert set(outputs) == {request.key for request in requests}
    # Four misses in a row of one sequence alone are possible, though rare, and end it rightly.
    for request in requests:
        output = outputs[request.key]
        if output.error is None:
            check_right(request, output)
        else:
            assert output.error.code == "out_of_memory" and len(starved.waited_s) >= 3
    assert starved.raised and starved.released >= starved.raised


@pytest.mark.parametrize("attempt", range(8))
def test_aborts_resets_and_preemptions_while_memory_is_short(attempt: int) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    fake = make_engine(run_ahead=attempt % 2 == 0, guesses=attempt % 4 < 2, num_blocks=24)
    fake.engine._preempt_every = rng.choice([None, 60])
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: tokens > 1 and rng.random() < 0.2
    starved.at_fetch = lambda: rng.random() < 0.1
    requests, aborted, outputs = {}, set(), {}
    for at in range(160):
        if at < 100 and rng.random() < 0.3:
            request = a_request(rng, f"r{at}", [7] * 16)
            requests[request.key] = request
            fake.engine.handle(Submit([request]))
        open_keys = [key for key in requests if key not in outputs and key not in aborted]
        if open_keys and rng.random() < 0.1:
            aborted.add(rng.choice(open_keys))
            fake.engine.handle(Abort(list(aborted)))
        if rng.random() < 0.02:
            fake.engine.handle(Reset(at))
            aborted |= {key for key in requests if key not in outputs}
        for event in fake.engine.step():
            outputs |= {output.key: output for output in event.outputs}
        fake.engine.check()
    outputs |= run(fake)
    assert set(outputs) == set(requests) - aborted
    for key, output in outputs.items():
        if output.error is None or output.error.code != "out_of_memory":
            check_right(requests[key], output)


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_become_as_small_as_memory_asks(ahead: bool) -> None:
    fake = make_engine(run_ahead=ahead, num_blocks=200, max_num_batched_tokens=64)
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: tokens > 5
    rng = random.Random(1)
    requests = [a_request(rng, f"r{at}", [1] * 20) for at in range(12)]
    fake.engine.handle(Submit(requests))
    outputs = run(fake)
    for request in requests:
        check_right(request, outputs[request.key])
    assert not starved.waited_s, "nobody was alone"
    assert max(fake.model.scheduled) <= 5


def test_steps_grow_again_and_ever_less_often_in_vain() -> None:
    fake = make_engine(num_blocks=200, max_num_seqs=1, max_num_batched_tokens=32)
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: tokens > 20
    for at in range(4):
        spec = RequestSpec(
            prompt_token_ids=tuple(range(at, at + 30)),
            sampling=SamplingParams(max_tokens=60, ignore_eos=True),
        )
        fake.engine.handle(Submit([EngineRequest(key=f"r{at}", spec=spec)]))
    shrunk = []
    while fake.engine.busy:
        before = starved.raised
        fake.engine.step()
        if starved.raised > before:
            shrunk.append(fake.engine.stats().steps)
    assert 2 <= len(shrunk) <= 4, shrunk
    assert fake.engine.scheduler.max_num_batched_tokens >= 15


def test_who_finds_no_memory_alone_ends_with_an_error_and_the_others_do_not() -> None:
    fake = make_engine(num_blocks=200, max_num_batched_tokens=64, run_ahead=True)
    starved = Starved(fake)
    long = EngineRequest(
        key="long",
        spec=RequestSpec(
            prompt_token_ids=tuple(i % 49 for i in range(80)),
            sampling=SamplingParams(max_tokens=4, ignore_eos=True),
        ),
    )
    rng = random.Random(2)
    others = [a_request(rng, f"r{at}", [3] * 9) for at in range(9)]

    def starves(tokens: int, seqs: int) -> bool:
        # As if attention to more than 60 keys took more than there is.
        return any(
            s.request.key == "long" and s.num_scheduled_tokens and s.num_computed_tokens > 60
            for s in fake.engine.scheduler.running
        )

    starved.at_launch = starves
    fake.engine.handle(Submit([long, *others]))
    outputs = run(fake)
    error = outputs["long"].error
    assert error is not None and error.code == "out_of_memory" and error.status is None
    assert "alone" in error.message
    assert starved.waited_s == [0.1, 0.5, 2.0]
    for request in others:
        check_right(request, outputs[request.key])


def test_a_moment_without_any_memory_ends_nobody() -> None:
    fake = make_engine(num_blocks=100)
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: len(starved.waited_s) < 2
    rng = random.Random(3)
    requests = [a_request(rng, f"r{at}", [3] * 9) for at in range(9)]
    fake.engine.handle(Submit(requests))
    outputs = run(fake)
    for request in requests:
        check_right(request, outputs[request.key])


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_to_be_written_is_not_found(ahead: bool) -> None:
    """The second request finds the first one's blocks in the same step; neither is written."""
    fake = make_engine(run_ahead=ahead, num_blocks=64, max_num_batched_tokens=64)
    starved = Starved(fake)
    starved.at_launch = lambda tokens, seqs: starved.raised < 1
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    prompt = tuple(range(24))
    requests = [
        EngineRequest(key=key, spec=RequestSpec(prompt_token_ids=prompt, sampling=sampling))
        for key in "ab"
    ]
    fake.engine.handle(Submit(requests))
    fake.engine.step()
    assert starved.raised == 1
    stats = fake.engine.stats()
    assert (stats.waiting, stats.running, stats.used_blocks, stats.cached_blocks) == (2, 0, 0, 0)
    outputs = run(fake)
    for request in requests:
        check_right(request, outputs[request.key])


def test_decodes_keep_their_blocks_when_a_step_is_taken_back() -> None:
    fake = make_engine(num_blocks=64)
    starved = Starved(fake)
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    requests = [
        EngineRequest(key=key, spec=RequestSpec(prompt_token_ids=(1, 2, 3, at), sampling=sampling))
        for at, key in enumerate("abcd")
    ]
    fake.engine.handle(Submit(requests))
    for _ in range(3):
        fake.engine.step()
    starved.at_launch = lambda tokens, seqs: starved.raised < 1
    fake.engine.step()
    assert starved.raised == 1 and fake.engine.stats().running == 4
    fake.model.scheduled.clear()
    outputs = run(fake)
    for request in requests:
        check_right(request, outputs[request.key])
    assert max(fake.model.scheduled) <= 4, "nothing was computed anew"


def test_a_decode_engine_without_memory_computes_what_it_pulled_itself() -> None:
    rng = random.Random(5)
    published: dict = {}
    prefill = make_engine("prefill", num_blocks=200, published=published)
    decode = make_engine("decode", num_blocks=200, published=published, run_ahead=True)
    decode.transfers.at_once = True
    starved = Starved(decode)
    starved.at_fetch = lambda: rng.random() < 0.4
    starved.at_launch = lambda tokens, seqs: tokens > 1 and rng.random() < 0.2
    requests = [a_request(rng, f"r{at}", [5] * 12) for at in range(10)]
    prefill.engine.handle(Submit(requests))
    outputs: dict[str, RequestOutput] = {}
    while prefill.engine.busy or decode.engine.busy:
        for event in prefill.engine.step():
            if isinstance(event, Prefilled):
                items = [Adoption(h.handoff_id, b"") for h in event.handoffs]
                decode.engine.handle(Adopt(items))
            elif isinstance(event, Finished):
                outputs |= {output.key: output for output in event.outputs}
        for event in decode.engine.step():
            if isinstance(event, Finished):
                outputs |= {output.key: output for output in event.outputs}
        decode.engine.check()
    assert starved.raised > 9
    for request in requests:
        check_right(request, outputs[request.key])


def test_other_errors_and_engines_of_several_ranks_are_not_kept_alive() -> None:
    fake = make_engine()

    def broken(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fake.model.execute = broken
    rng = random.Random(6)
    fake.engine.handle(Submit([a_request(rng, "a", [1] * 5)]))
    with pytest.raises(RuntimeError, match="illegal"):
        fake.engine.step()
    assert fake.engine.stats().waiting == 1, "it is computed again, should the engine go on"

    class OneGone:
        def check(self) -> None:
            raise EngineDied("a rank has ended")

    ranks = make_engine(ranks=OneGone())
    ranks.model.execute = lambda batch: (_ for _ in ()).throw(out_of_memory())
    ranks.engine.handle(Submit([a_request(rng, "a", [1] * 5)]))
    with pytest.raises(torch.OutOfMemoryError):
        ranks.engine.step()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (out_of_memory(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_counts_as_no_memory(error: BaseException | None, expected: bool) -> None:
    assert is_shortage(error) is expected


def test_an_engine_goes_without_a_collection_of_cycles() -> None:
    """A GPU's pool must not wait for one."""
    fake = make_engine()
    gone = weakref.ref(fake.engine)
    gc.disable()
    try:
        del fake
        assert gone() is None
    finally:
        gc.enable()
