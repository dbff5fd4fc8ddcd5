"""How long outputs become, and who may start because of that."""

from __future__ import annotations

import random

import numpy as np
import pytest
from engine_fakes import FakeEngine, make_engine
from hypothesis import given
from hypothesis import strategies as st

from pdbatch.engine.forecast import OutputLengths, _peak
from pdbatch.engine.messages import EngineRequest, Finished, Submit
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

MOST = 4096


SHARES = (np.arange(1000) + 0.5) / 1000


def left(lengths: OutputLengths, age: int = 0, most: int = MOST, running: object = ()):
    survival = lengths.survival(np.array(running, dtype=np.float64))
    return survival.left(np.full(1000, float(age)), np.full(1000, float(most)), SHARES)


def expected(*args, **kwargs) -> float:
    return float(left(*args, **kwargs).mean())


@pytest.mark.parametrize("mean", [5, 40, 300, 1000])
def test_outputs_that_end_at_a_steady_rate_have_as_much_before_them_at_any_age(mean: int) -> None:
    rng, lengths = random.Random(mean), OutputLengths()
    for _ in range(3000):
        length = 1 + int(rng.expovariate(1 / mean))
        lengths.ended(min(length, MOST), by_itself=length <= MOST)
    for age in (0, 1, mean // 2, mean):
        assert expected(lengths, age) == pytest.approx(mean, rel=0.25)
    assert expected(lengths, most=mean) == pytest.approx(mean * 0.63, rel=0.15)
    assert np.median(left(lengths)) == pytest.approx(mean * 0.69, rel=0.25)


def test_lengths_of_two_kinds_are_dealt_out_as_two_kinds() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.ended(20, by_itself=True)
        lengths.ended(3000, by_itself=True)
    dealt = left(lengths)
    assert 0.4 < (dealt < 128).mean() < 0.6 and 0.35 < (dealt > 2000).mean() < 0.6
    assert np.quantile(left(lengths, age=200), 0.1) > 1000


def test_what_max_tokens_cuts_off_says_nothing_of_where_outputs_end() -> None:
    lengths = OutputLengths()
    for _ in range(500):
        lengths.ended(50, by_itself=False)
    assert expected(lengths, most=50) > 49
    assert expected(lengths) > 100


def test_those_that_still_run_count_too() -> None:
    lengths = OutputLengths()
    for _ in range(5):
        lengths.ended(4, by_itself=True)
    assert expected(lengths) < 60
    assert expected(lengths, running=[120] * 500) > 128


def test_an_older_job_is_forgotten() -> None:
    lengths = OutputLengths()
    for _ in range(20_000):
        lengths.ended(1000, by_itself=True)
    for _ in range(20_000):
        lengths.ended(20, by_itself=True)
    assert expected(lengths) < 25


@given(
    ends=st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), max_size=60),
    copies=st.integers(1, 500),
    age=st.integers(0, 300_000),
    most=st.integers(0, 300_000),
)
def test_never_less_than_one_token_nor_more_than_there_may_be(ends, copies, age, most) -> None:
    lengths = OutputLengths()
    for length, by_itself in ends * copies:
        lengths.ended(length, by_itself=by_itself)
    dealt = left(lengths, age, most)
    assert min(1, most) <= dealt.min() and dealt.max() <= most


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=12),
    st.integers(1, 16),
)
def test_the_peak_is_that_of_a_simulation(sequences, block_size) -> None:
    most = 0
    for step in range(41):  # of a block each: those of `left` blocks have given all back after them
        alive = [(own, left) for own, left in sequences if left >= step]
        gone = sum(own for own, left in sequences if left < step)
        most = max(most, len(alive) * step - gone)
    own, left = zip(*sequences, strict=True)
    assert _peak(list(own), [blocks * block_size for blocks in left], block_size) == most


def crowd(seed: int, **params) -> list[EngineRequest]:
    rng = random.Random(seed)
    requests = []
    for index in range(60):
        ids = tuple(rng.randrange(49) for _ in range(rng.randrange(1, 20)))
        sampling = SamplingParams(max_tokens=rng.randrange(1, 60), **params)
        spec = RequestSpec(prompt_token_ids=ids, sampling=sampling)
        requests.append(EngineRequest(key=f"k{index}", spec=spec))
    return requests


def run(fake: FakeEngine, requests: list[EngineRequest]) -> dict[str, list[list[int]]]:
    fake.engine.handle(Submit(requests))
    told = {}
    while fake.engine.busy:
        for event in fake.engine.step():
            if isinstance(event, Finished):
                told |= {o.key: [c.token_ids for c in o.outputs] for o in event.outputs}
        fake.engine.check()
    return told


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_where_lengths_are_known_few_are_preempted_and_less_is_computed(
    seed: int, outputs: int, ahead: bool
) -> None:
    requests = crowd(seed, ignore_eos=True, n=outputs)
    told, preempted, computed = [], [], []
    for foresees in (True, False):
        fake = make_engine(
            num_blocks=60,
            max_num_seqs=24,
            max_num_batched_tokens=64,
            run_ahead=ahead,
            foresees=foresees,
        )
        told.append(run(fake, requests))
        preempted.append(fake.engine.stats().preemptions)
        computed.append(sum(fake.model.scheduled))
    assert told[0] == told[1] and len(told[0]) == len(requests)
    assert preempted[0] <= preempted[1] / 5, f"seed {seed}"
    assert computed[0] < computed[1], f"seed {seed}"


def test_nobody_is_held_back_where_the_pool_will_do() -> None:
    fake = make_engine(num_blocks=60, max_num_seqs=24, prefix_caching=False)
    ten = [
        EngineRequest(
            key=f"k{i}",
            spec=RequestSpec(
                prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=18, ignore_eos=True)
            ),
        )
        for i in range(10)
    ]  # 20 tokens each that have KV: 5 blocks
    fake.engine.handle(Submit(ten))
    fake.engine.step()
    assert len(fake.engine.scheduler.running) == 10 and not fake.engine.stats().held


def test_prompts_that_leave_at_their_first_token_are_not_held_back() -> None:
    fake = make_engine("prefill", num_blocks=60, max_num_seqs=24, pinned_share=1.0)
    sampling = SamplingParams(max_tokens=90, ignore_eos=True)
    fake.engine.handle(
        Submit(
            [
                EngineRequest(
                    key=f"k{i}", spec=RequestSpec(prompt_token_ids=(i, 2, 3), sampling=sampling)
                )
                for i in range(8)
            ]
        )
    )
    fake.engine.step()
    assert len(fake.engine.scheduler.running) == 0 == fake.engine.stats().waiting


def test_one_that_ends_early_makes_room_for_one_that_comes_later() -> None:
    """10 blocks: a and b together need 11 at their ends, but a ends first."""

    def request(key: str, most: int) -> EngineRequest:
        sampling = SamplingParams(max_tokens=most, ignore_eos=True)
        return EngineRequest(
            key=key, spec=RequestSpec(prompt_token_ids=(1, 2, 3, len(key)), sampling=sampling)
        )

    fake = make_engine(num_blocks=10, prefix_caching=False)
    fake.engine.handle(Submit([request("a", 9), request("bb", 29)]))
    fake.engine.step()
    assert len(fake.engine.scheduler.running) == 2
    run(fake, [])
    assert fake.engine.stats().preemptions == 0
    fake.engine.handle(Submit([request("a", 25), request("bb", 29)]))
    fake.engine.step()
    assert len(fake.engine.scheduler.running) == 1 and fake.engine.stats().held
    run(fake, [])
    assert not fake.engine.stats().held
