"""The sampler: the right distribution, the same numbers everywhere, rows on their own."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from pdbatch.engine import rng, sampler
from pdbatch.engine.model_input import SampledToken, SamplingState
from pdbatch.engine.sampler import Sampler
from pdbatch.sampling import SamplingParams

VOCAB = 50
CPU = torch.device("cpu")


def state(
    seed: int = 0,
    output: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    tokens: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    **params,
) -> SamplingState:
    return SamplingState(
        params=SamplingParams(**params),
        seed=seed,
        output_index=output,
        prompt_token_ids=list(prompt),
        output_token_ids=list(tokens),
        stop_token_ids=frozenset(stops),
    )


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[SampledToken]:
    return Sampler(logits.shape[1], logits.device).sample(logits, states)


def tokens(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return [token.token_id for token in sample(logits, states)]


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")  # shown when a test fails
    return value


def _expected(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities by a plain loop over tokens sorted by likelihood."""
    scaled = (logits.double() / params.temperature).tolist()
    top = max(scaled)
    kept = {t: math.exp(x - top) for t, x in enumerate(scaled)}
    kept = {t: p for t, p in kept.items() if p >= params.min_p}
    if params.top_k > 0:
        kept = dict(sorted(kept.items(), key=lambda item: -item[1])[: params.top_k])
    total, cumulated, nucleus = sum(kept.values()), 0.0, {}
    for token, p in sorted(kept.items(), key=lambda item: -item[1]):
        if cumulated >= params.top_p * total:
            break
        nucleus[token] = p
        cumulated += p
    probs = np.zeros(len(scaled))
    for token, p in nucleus.items():
        probs[token] = p / sum(nucleus.values())
    return probs


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(params: dict, seed: int) -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    expected = _expected(row, SamplingParams(**params))
    draws, at_once = 8000, 2000
    counts: Counter[int] = Counter()
    for start in range(0, draws, at_once):
        states = [state(seed + i, **params) for i in range(start, start + at_once)]
        counts.update(tokens(row.expand(at_once, -1), states))
    observed = np.array([counts[t] for t in range(VOCAB)], dtype=float)
    assert observed[expected == 0].sum() == 0
    often = expected * draws >= 5
    chi2 = ((observed - expected * draws)[often] ** 2 / (expected[often] * draws)).sum()
    freedom = max(1, often.sum() - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit, f"chi-square {chi2:.1f} with {freedom} degrees of freedom, seed {seed}"


def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    pick = random.Random(seed)
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(seed)) * 0.5
    logits = logits.to(torch.bfloat16)  # ties abound
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"top_p": 0.9},
        {"top_p": 0.3, "top_k": 40},
        {"min_p": 0.1, "logprobs": 3},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5},
        {"temperature": 0, "logprobs": 5, "logit_bias": {7: 30.0}},
    ]
    states = [
        state(pick.randrange(2**63), row % 3, tokens=(5, 9, 9)[: row % 4], **kinds[row % 7])
        for row in range(40)
    ]
    together = sample(logits, states)
    alone = [sample(logits[row : row + 1], [states[row]])[0] for row in range(40)]
    assert together == alone
    order = list(range(40))
    pick.shuffle(order)
    shuffled = sample(logits[order], [states[row] for row in order])
    assert [shuffled[order.index(row)] for row in range(40)] == together


def test_many_rows_are_sorted_some_at_a_time(seed: int, monkeypatch) -> None:
    logits = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(seed))
    kinds = [{"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 2, "top_k": 9}]
    states = [state(row, **kinds[row % 3]) for row in range(11)]
    at_once = tokens(logits, states)
    asked = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(
        torch.Tensor, "sort", lambda x, *a, **k: asked.append(len(x)) or sort(x, *a, **k)
    )
    monkeypatch.setattr(sampler, "_SORTED_AT_ONCE", 4 * VOCAB + 1)
    assert tokens(logits, states) == at_once
    assert asked and max(asked) <= 4


def test_a_nucleus_wider_than_the_first_look_is_found_whole() -> None:
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1)) * 0.1
    expected = _expected(logits[0], SamplingParams(top_p=0.95))
    drawn = tokens(logits.expand(500, -1), [state(s, top_p=0.95) for s in range(500)])
    assert all(expected[token] > 0 for token in drawn)
    ranked = np.argsort(-logits[0].numpy())
    assert max(int(np.where(ranked == token)[0][0]) for token in drawn) > 4096


def test_penalties_equal_the_plain_reference(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, VOCAB, generator=gen) * 3
    pick = random.Random(seed)
    states = []
    for _ in range(6):
        states.append(
            state(
                prompt=tuple(pick.choices(range(VOCAB), k=9)),
                tokens=tuple(pick.choices(range(VOCAB), k=pick.randrange(12))),
                stops=(3, 4),
                temperature=0,
                min_tokens=pick.choice([0, 5, 20]),
                repetition_penalty=pick.choice([1.0, 1.3, 0.7]),
                presence_penalty=pick.choice([0.0, 0.8, -1.0]),
                frequency_penalty=pick.choice([0.0, 0.6]),
                logit_bias=pick.choice([{}, {2: 5.0, 8: -100.0, 10**6: 1.0}]),
            )
        )
    expected = []
    for row, st in zip(logits.tolist(), states, strict=True):
        p, counts = st.params, Counter(st.output_token_ids)
        for token in range(VOCAB):
            if token in st.prompt_token_ids or token in counts:
                rep = p.repetition_penalty
                row[token] = row[token] / rep if row[token] > 0 else row[token] * rep
            row[token] -= p.frequency_penalty * counts[token]
            row[token] -= p.presence_penalty * (token in counts)
            row[token] += p.logit_bias.get(token, 0.0)
            if token in st.stop_token_ids and len(st.output_token_ids) < p.min_tokens:
                row[token] = -math.inf
        expected.append(max(range(VOCAB), key=row.__getitem__))
    before = logits.clone()
    assert tokens(logits, states) == expected
    assert torch.equal(logits, before), "the caller's logits were changed"


def test_logprobs_are_those_of_the_raw_logits(seed: int) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed))
    reference = torch.log_softmax(logits.double(), -1)
    states = [
        state(temperature=0, logprobs=4),
        state(seed, temperature=0.5, top_k=3, logprobs=0, logit_bias={5: 4.0}),
        state(temperature=0),
    ]
    first, second, third = sample(logits, states)
    ranked = reference[0].sort(descending=True)
    assert [t for t, _ in first.top] == ranked.indices[:4].tolist()
    assert [p for _, p in first.top] == pytest.approx(ranked.values[:4].tolist(), abs=1e-5)
    assert first.logprob == pytest.approx(first.top[0][1])
    assert second.top == ()
    assert second.logprob == pytest.approx(float(reference[1, second.token_id]), abs=1e-5)
    assert third.logprob is None


def test_the_same_seed_output_and_position_give_the_same_token() -> None:
    logits = torch.zeros(1, 10_000)
    drawn = {
        (s, o, n): tokens(logits, [state(s, o, tokens=(1,) * n)])[0]
        for s in (0, 1, -5, 2**63 - 1)
        for o in (0, 1)
        for n in (0, 1, 2)
    }
    assert tokens(logits, [state(-5, 1, tokens=(1, 1))])[0] == drawn[-5, 1, 2]
    assert len(set(drawn.values())) >= len(drawn) - 1


def test_uniforms_are_even_independent_of_company_and_fixed() -> None:
    many = rng.uniforms([7] * 20_000, [0] * 20_000, list(range(20_000)))
    assert many.min() > 0 and many.max() < 1
    counts = np.histogram(many, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 100  # 49 degrees of freedom: p about 2e-5
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.03
    assert rng.uniforms([7], [0], [123])[0] == many[123]
    fixed = rng.uniforms([0, 1, -1], [0, 3, 1], [0, 5, 1000]).tolist()
    assert fixed == [0.3380524516105652, 0.6964794993400574, 0.1733275055885315]
    assert rng.seed_from_key("job:3") == rng.seed_from_key("job:3") != rng.seed_from_key("job:4")


def test_rare_extremes_of_the_uniform_never_leave_the_kept_tokens(monkeypatch) -> None:
    logits = torch.full((1, 1000), -30.0)
    logits[0, 500:503] = 5.0
    for extreme in (2.0**-24, 1 - 2.0**-24):
        monkeypatch.setattr(rng, "uniforms", lambda *_, x=extreme: np.array([x], np.float32))
        assert tokens(logits, [state(top_k=3)])[0] in (500, 501, 502)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_tokens() -> None:
    logits = torch.randn(64, 4000, generator=torch.Generator().manual_seed(3))
    states = [state(s, top_p=0.9 if s % 2 else 1.0) for s in range(64)]
    assert tokens(logits.cuda(), states) == tokens(logits, states)


@pytest.mark.parametrize("spread", [0.02, 3.0])
def test_a_guessed_nucleus_is_mended_when_it_was_too_small(seed: int, spread: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, 1000, generator=gen) * spread
    kinds = [{"top_p": 0.9}, {"top_p": 0.99, "top_k": 300}, {"temperature": 0}, {"min_p": 0.01}]
    states = [state(seed=s, tokens=(1,) * s, **kinds[s % 4]) for s in range(24)]
    exact = Sampler(1000, CPU, guess=False).choose(logits, states)
    sampler = Sampler(1000, CPU, guess=True)
    guessed = sampler.choose(logits, states)
    for own in states:  # as while the next step is in flight
        own.num_pending_tokens += 2
    wanted = exact.fetch()
    assert guessed.fetch() == wanted and not exact.corrected
    told = guessed.tokens.tolist()
    wrong = [s for s, token in enumerate(wanted) if told[s] != token.token_id]
    assert guessed.corrected == wrong and bool(wrong) == (spread < 1)
    assert all(s % 4 < 2 for s in wrong), "only nuclei are guessed"
    next_one = sampler.choose(logits, states)
    next_one.fetch()
    assert not next_one.corrected, "where guesses fail none is made for a while"
