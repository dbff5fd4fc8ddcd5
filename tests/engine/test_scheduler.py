"""The scheduler's choices, and the engine's answers to commands, on fakes."""

from __future__ import annotations

import pytest
from engine_fakes import FakeEngine, make_engine

from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    Drain,
    Drained,
    EngineRequest,
    Event,
    Finished,
    Prefilled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams


def request(key: str, prompt: int, most: int | None = 5, priority: int = 0, **params):
    sampling = SamplingParams(max_tokens=most, ignore_eos=True, **params)
    ids = tuple((sum(key.encode()) + i) % 49 for i in range(prompt))
    spec = RequestSpec(prompt_token_ids=ids, sampling=sampling)
    return EngineRequest(key=key, spec=spec, priority=priority)


def run(fake: FakeEngine, most_steps: int = 1000) -> list[Event]:
    """Step until idle."""
    events: list[Event] = []
    for _ in range(most_steps):
        events += fake.engine.step()
        fake.engine.check()
        if not fake.engine.busy:
            return events
    raise AssertionError(f"still busy after {most_steps} steps: {fake.engine.stats()}")


def ended(events: list[Event]) -> list[str]:
    return [o.key for event in events if isinstance(event, Finished) for o in event.outputs]


def test_decodes_come_first_and_long_prompts_in_chunks() -> None:
    fake = make_engine(max_num_batched_tokens=10, prefix_caching=False)
    fake.engine.handle(Submit([request("short", 4, 8)]))
    fake.engine.step()
    fake.engine.handle(Submit([request("long", 25, 2)]))
    run(fake)
    assert fake.model.scheduled[:5] == [4, 10, 10, 8, 2]  # 1 + 9, 1 + 9, 1 + 7, then 1 + 1


def test_smaller_priority_first_then_arrival() -> None:
    fake = make_engine(max_num_seqs=1)
    fake.engine.handle(
        Submit([request("late", 4, 2, 5), request("a", 4, 2), request("b", 4, 2, 1)])
    )
    assert ended(run(fake)) == ["a", "b", "late"]


def test_the_latest_is_preempted_and_comes_to_the_same_end() -> None:
    fake = make_engine(num_blocks=10, block_size=4, foresees=False)
    fake.engine.handle(Submit([request("first", 8, 20), request("second", 8, 20)]))
    assert ended(run(fake)) == ["first", "second"]
    assert fake.engine.stats().preemptions >= 1


def test_nobody_starts_over_the_head_of_who_waits_for_room() -> None:
    fake = make_engine(num_blocks=10, block_size=4, prefix_caching=False)
    fake.engine.handle(
        Submit([request("runs", 20, 6), request("big", 24, 2), request("small", 4, 2)])
    )
    fake.engine.step()
    assert [s.request.key for s in fake.engine.scheduler.waiting] == ["big", "small"]
    assert ended(run(fake))[0] == "runs"


@pytest.mark.parametrize(
    ("prompt", "most", "words"),
    [(100, 1, "shorten it"), (60, 41, "lower max_tokens"), (39, 5, None), (99, None, None)],
)
def test_what_can_never_fit_is_refused_at_once(prompt: int, most: int, words: str) -> None:
    fake = make_engine(num_blocks=25, block_size=4, max_model_len=100)
    fake.engine.handle(Submit([request("k", prompt, most)]))
    (output,) = [o for event in run(fake) for o in event.outputs]
    if words is None:
        assert output.error is None
        assert output.usage.completion_tokens == (most or 1)
    else:
        assert output.error.code == "context_length_exceeded"
        assert words in output.error.message and fake.model.steps == 0


def test_a_pool_smaller_than_the_model_s_length_sets_the_limit() -> None:
    fake = make_engine(num_blocks=5, block_size=4, max_model_len=100)
    fake.engine.handle(Submit([request("fits", 16, 5), request("not", 16, 6)]))
    outputs = {o.key: o for event in run(fake) for o in event.outputs}
    assert outputs["fits"].error is None and outputs["not"].error is not None


def test_more_outputs_than_places_wait_for_theirs() -> None:
    fake = make_engine(max_num_seqs=2, num_blocks=12)
    fake.engine.handle(Submit([request("k", 9, 6, n=7)]))
    (output,) = [o for event in run(fake) for o in event.outputs]
    assert [completion.index for completion in output.outputs] == list(range(7))


def test_pins_beyond_their_share_hold_prefill_back() -> None:
    fake = make_engine("prefill", num_blocks=20, pinned_share=0.4, max_num_batched_tokens=12)
    fake.engine.handle(Submit([request(f"k{i}", 12) for i in range(6)]))
    handoffs = [h for e in run(fake) if isinstance(e, Prefilled) for h in e.handoffs]
    pinned = len(handoffs)
    assert pinned == 3 and fake.engine.stats().waiting == 6 - pinned
    fake.engine.handle(Unpin([h.handoff_id for h in handoffs]))
    assert sum(len(e.handoffs) for e in run(fake) if isinstance(e, Prefilled)) == 6 - pinned


def test_drain_ends_what_runs_and_names_what_it_drops() -> None:
    fake = make_engine(max_num_seqs=1)
    fake.engine.handle(Submit([request("runs", 4, 5), request("waits", 4, 5)]))
    fake.engine.step()
    fake.engine.handle(Drain())
    fake.engine.handle(Submit([request("late", 4, 5)]))
    events = run(fake)
    assert ended(events) == ["runs"]
    assert events[-1] == Drained(["waits", "late"])
    fake.engine.handle(Submit([request("next", 4, 5)]))
    assert ended(run(fake)) == ["next"]


def test_drain_leaves_pins_alone() -> None:
    fake = make_engine("prefill")
    fake.engine.handle(Submit([request("k", 8)]))
    fake.engine.handle(Drain())  # it has not begun
    assert run(fake) == [Drained(["k"])]
    fake.engine.handle(Submit([request("k", 8)]))
    run(fake)
    fake.engine.handle(Drain())
    assert run(fake) == [Drained([])]
    assert fake.engine.stats().pinned_requests == 1


def test_a_request_submitted_again_replaces_itself() -> None:
    fake = make_engine()
    fake.engine.handle(Submit([request("k", 8, 6)]))
    fake.engine.step()
    fake.engine.handle(Submit([request("k", 8, 6)]))
    assert ended(run(fake)) == ["k"]
    assert fake.engine.stats().used_blocks == 0


def test_a_handoff_adopted_again_after_a_reset_waits_for_the_dropped_read() -> None:
    published: dict = {}
    prefill = make_engine("prefill", published=published)
    decode = make_engine("decode", published=published)
    prefill.engine.handle(Submit([request("k", 8)]))
    (prefilled,) = run(prefill)
    adoption = Adoption(prefilled.handoffs[0].handoff_id, b"")
    decode.engine.handle(Adopt([adoption]))
    decode.engine.step()
    decode.engine.handle(Adopt([adoption]))
    (duplicate,) = decode.engine.step()
    assert isinstance(duplicate, PullFailed) and duplicate.code == "Duplicate"
    decode.engine.handle(Reset(1))
    decode.engine.handle(Adopt([adoption]))
    decode.engine.step()
    assert list(decode.transfers.pulling) == [adoption.handoff_id]
    decode.transfers.end(adoption.handoff_id, ok=True)  # the dropped one
    decode.engine.step()
    decode.engine.step()
    decode.transfers.end(adoption.handoff_id, ok=True)
    assert ended(run(decode)) == ["k"]
    assert decode.engine.stats().used_blocks == 0


def test_abort_of_a_pinned_request_frees_its_blocks() -> None:
    fake = make_engine("prefill")
    fake.engine.handle(Submit([request("k", 8)]))
    run(fake)
    assert fake.engine.stats().used_blocks == 2
    fake.engine.handle(Abort(["k"]))
    assert fake.engine.stats().used_blocks == 0 and not fake.transfers.offered
