"""Whatever happens: requests end once, with the right tokens, and every block is accounted for."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from engine_fakes import FakeEngine, Published, expected_output, make_engine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    EngineRequest,
    Event,
    Finished,
    Prefilled,
    Pulled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.engine.rng import seed_from_key
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.sampling import SamplingParams


class World(RuleBasedStateMachine):
    """A prefill, a decode and a mixed engine, and everything that their main processes may do."""

    @initialize(
        caching=st.booleans(),
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(14, 40),
        places=st.integers(1, 6),
        budget=st.integers(3, 40),
        share=st.sampled_from([0.1, 0.5, 1.0]),
        ahead=st.booleans(),
        guesses=st.booleans(),
        foresees=st.booleans(),
    )
    def build(
        self, caching, block_size, num_blocks, places, budget, share, ahead, guesses, foresees
    ) -> None:
        self.published: dict[str, Published] = {}
        self.engines: dict[str, FakeEngine] = {
            role: make_engine(
                role,
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=places,
                max_num_batched_tokens=budget,
                prefix_caching=caching,
                pinned_share=share,
                published=self.published,
                run_ahead=ahead,
                guesses=guesses,
                foresees=foresees,
            )
            for role in ("prefill", "decode", "mixed")
        }
        self.longest = num_blocks * block_size + 1
        self.specs: dict[str, RequestSpec] = {}
        self.ready: list[tuple[str, str]] = []
        self.claimed: dict[str, str] = {}
        """Hand-off to key; claimed and not yet released."""
        self.outputs: dict[str, RequestOutput] = {}
        self.aborted: set[str] = set()
        self.epoch = 0

    # --- what main processes do

    @rule(
        role=st.sampled_from(["prefill", "mixed"]),
        prefix=st.integers(0, 2),
        shared=st.integers(0, 20),
        own=st.integers(0, 10),
        most=st.integers(1, 20),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(0, 1),
        seed=st.sampled_from([None, 7]),
        ignore_eos=st.booleans(),
        stops=st.sampled_from([0, 0, 5, 20]),
        penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    )
    def submit(
        self, role, prefix, shared, own, most, n, priority, seed, ignore_eos, stops, penalty
    ) -> None:
        key = f"{role}:{len(self.specs)}"
        prompt = [prefix] * shared + [(len(self.specs) + i) % 49 for i in range(own)] or [prefix]
        params = SamplingParams(
            max_tokens=most,
            n=n,
            seed=seed,
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(range(stops)),
            presence_penalty=penalty,  # the fake ignores it, the engine must not run ahead
        )
        self.specs[key] = RequestSpec(prompt_token_ids=tuple(prompt), sampling=params)
        self._submit(key, priority)

    def _submit(self, key: str, priority: int = 0) -> None:
        request = EngineRequest(key=key, spec=self.specs[key], priority=priority)
        self.engines[key.split(":")[0]].engine.handle(Submit([request]))

    @rule(role=st.sampled_from(["prefill", "decode", "mixed"]), times=st.integers(1, 4))
    def step(self, role, times) -> None:
        for _ in range(times):
            for event in self.engines[role].engine.step():
                self._on_event(event)
            self.engines[role].engine.check()

    @precondition(lambda self: self.ready)
    @rule(choice=st.integers(0, 99))
    def claim(self, choice) -> None:
        key, handoff_id = self.ready.pop(choice % len(self.ready))
        self.claimed[handoff_id] = key
        self.engines["decode"].engine.handle(Adopt([Adoption(handoff_id, b"")]))

    @precondition(lambda self: self.engines["decode"].transfers.pulling)
    @rule(choice=st.integers(0, 99), ok=st.sampled_from([True, True, False]))
    def end_pull(self, choice, ok) -> None:
        transfers = self.engines["decode"].transfers
        handoff_id = sorted(transfers.pulling)[choice % len(transfers.pulling)]
        transfers.end(handoff_id, ok=ok)

    @precondition(lambda self: self.specs)
    @rule(choice=st.integers(0, 99))
    def abort(self, choice) -> None:
        key = sorted(self.specs)[choice % len(self.specs)]
        if key not in self.outputs:
            self.aborted.add(key)
            self.ready = [(k, h) for k, h in self.ready if k != key]
            for fake in self.engines.values():
                fake.engine.handle(Abort([key]))

    @rule()
    def preempt_one(self) -> None:
        for role in ("decode", "mixed"):
            scheduler = self.engines[role].engine.scheduler
            self.engines[role].engine.settle()
            if scheduler.running:
                scheduler.preempt(scheduler.running[len(scheduler.running) // 2])

    @precondition(lambda self: self.ready)
    @rule()
    def unpin_unclaimed(self) -> None:
        """The producer gives a hand-off up: whoever claims it later must notice."""
        key, handoff_id = self.ready[0]
        self.engines["prefill"].engine.handle(Unpin([handoff_id]))
        self.ready.pop(0)
        self._submit(key)

    @precondition(lambda self: self.epoch < 2)
    @rule()
    def fence_decode(self) -> None:
        """Everything on the decode engine is dropped and prefilled again."""
        self.epoch += 1
        self.engines["decode"].engine.handle(Reset(self.epoch))
        lost = [k for k in self.specs if k.startswith("prefill") and k in self._adopted()]
        self.engines["prefill"].engine.handle(Unpin(list(self.claimed)))  # as a sweep would
        self.claimed.clear()
        for key in lost:
            self._submit(key)

    def _adopted(self) -> set[str]:
        """Keys that left the prefill engine and have not ended."""
        engine = self.engines["prefill"].engine
        here = set(engine._life.open) | {key for key, _ in self.ready}
        return set(self.specs) - here - set(self.outputs) - self.aborted

    def _on_event(self, event: Event) -> None:
        prefill = self.engines["prefill"].engine
        match event:
            case Finished(outputs):
                for output in outputs:
                    assert output.key not in self.outputs, f"{output.key} ended twice"
                    assert output.key not in self.aborted
                    self.outputs[output.key] = output
            case Prefilled(handoffs):
                self.ready += [(handoff.key, handoff.handoff_id) for handoff in handoffs]
            case Pulled(ids):
                for handoff_id in ids:
                    del self.claimed[handoff_id]
                prefill.handle(Unpin(ids))
            case PullFailed(handoff_id, key, code, _message):
                self.claimed.pop(handoff_id, None)
                prefill.handle(Unpin([handoff_id]))
                if code == "Aborted":
                    assert key in self.aborted
                elif key not in self.aborted:
                    self._submit(key)

    # --- what must hold

    @invariant()
    def accounts(self) -> None:
        for fake in getattr(self, "engines", {}).values():
            fake.engine.check()
            assert fake.engine.scheduler.max_num_batched_tokens >= max(
                fake.model.scheduled, default=0
            )

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        deadline = time.monotonic() + 20
        while set(self.specs) - set(self.outputs) - self.aborted:
            assert time.monotonic() < deadline, self._describe()
            self.step("prefill", 1)
            self.step("decode", 1)
            self.step("mixed", 1)
            while self.ready:
                self.claim(0)
            for handoff_id in list(self.engines["decode"].transfers.pulling):
                self.engines["decode"].transfers.end(handoff_id, ok=True)
        for handoff_id in list(self.engines["decode"].transfers.pulling):
            self.engines["decode"].transfers.end(handoff_id, ok=True)
        for _ in range(3):
            for role in self.engines:
                self.step(role, 1)
        for role, fake in self.engines.items():
            stats = fake.engine.stats()
            held = (stats.used_blocks, stats.waiting, stats.running, stats.pulling)
            assert held == (0, 0, 0, 0), f"{role} leaks: {stats}"
            assert not fake.transfers.offered
        for key, output in self.outputs.items():
            self._check_output(key, output)

    def _describe(self) -> str:
        open_keys = sorted(set(self.specs) - set(self.outputs) - self.aborted)
        stats = {role: fake.engine.stats() for role, fake in self.engines.items()}
        waiting = {r: fake.engine.scheduler.waiting for r, fake in self.engines.items()}
        running = {r: fake.engine.scheduler.running for r, fake in self.engines.items()}
        return f"{open_keys} do not end: {stats}, waiting {waiting}, running {running}"

    def _check_output(self, key: str, output: RequestOutput) -> None:
        spec = self.specs[key]
        prompt, params = spec.prompt_token_ids, spec.sampling
        if output.error is not None:
            assert output.error.code == "context_length_exceeded"
            assert len(prompt) + params.max_tokens > min(self.longest, 100)
            return
        seed = params.seed if params.seed is not None else seed_from_key(key)
        for index, completion in enumerate(output.outputs):
            wanted = expected_output(prompt, params, seed, index, params.max_tokens)
            assert completion.token_ids == wanted, key
        assert len(output.outputs) == params.n
        assert output.usage.prompt_tokens == len(prompt)


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


@pytest.mark.parametrize("foresees", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_under_pressure(seed: int, ahead: bool, foresees: bool) -> None:
    """Hundreds of requests through a pool far too small for them."""
    rng = random.Random(seed)
    fake = make_engine(
        "mixed",
        num_blocks=24,
        max_num_seqs=12,
        max_num_batched_tokens=48,
        run_ahead=ahead,
        foresees=foresees,
    )
    ticks = itertools.count()
    fake.engine._stepper._clock = lambda: float(next(ticks))  # a step takes a second
    specs = {}
    for index in range(150):
        prompt = [rng.randrange(3)] * rng.randrange(1, 30) + [rng.randrange(49)] * rng.randrange(9)
        params = SamplingParams(max_tokens=rng.randrange(1, 40), n=rng.choice([1, 1, 2, 4]))
        specs[f"k{index}"] = RequestSpec(prompt_token_ids=tuple(prompt), sampling=params)
    requests = [EngineRequest(key=key, spec=spec) for key, spec in specs.items()]
    fake.engine.handle(Submit(requests))
    outputs: dict[str, RequestOutput] = {}
    while fake.engine.busy:
        for event in fake.engine.step():
            assert isinstance(event, Finished)
            outputs |= {output.key: output for output in event.outputs}
        fake.engine.check()
    assert outputs.keys() == specs.keys()
    for key, spec in specs.items():
        params = spec.sampling
        for index, completion in enumerate(outputs[key].outputs):
            wanted = expected_output(
                spec.prompt_token_ids, params, seed_from_key(key), index, params.max_tokens
            )
            assert completion.token_ids == wanted, f"seed {seed}, {key}"
    stats = fake.engine.stats()
    assert stats.used_blocks == 0 and stats.preemptions > 0 and stats.cached_tokens > 0
    shares = sum(output.times.engine_s for output in outputs.values())
    if not ahead:
        assert shares == pytest.approx(stats.steps), "all time is somebody's"
    else:  # a step begins before the one before it has ended
        assert stats.steps < shares < 2 * stats.steps
