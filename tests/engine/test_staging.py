"""The hand-off through a staging area: the same tokens, however small it is, and nothing leaks."""

from __future__ import annotations

import select
from dataclasses import replace

import pytest
import tiny_models
import torch
from test_handoff import Pair, alone, make_requests, token_ids

from kvxfer.transports import Fault, MemTransport
from pdbatch.engine import build
from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.messages import (
    Abort,
    Drain,
    Drained,
    EngineRequest,
    Finished,
    Handoff,
    Prefilled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.engine.staging import StagedTransfers, staging_blocks
from pdbatch.errors import ConfigError
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

torch.set_num_threads(1)
BLOCK_BYTES = 3 * 2 * 8 * 2 * 16 * 4
SMALL = {"kv_staging_bytes": 16 * BLOCK_BYTES, "max_model_len": 128}
"""Room for one long prompt or a few short ones."""


@pytest.fixture(scope="module")
def model():
    return tiny_models.loaded(tiny_models.make("llama"))


def engine(role: str, model, ways=None, **changes) -> Engine:
    values = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 8, "kv_transport": ("mem",)}
    values |= {"worker": role, "secret": "s", "max_num_batched_tokens": 64}
    config = EngineConfig(model="tiny", home="unused", role=role, **(values | changes))
    return build_engine(config, model, ways=ways, staged=True)


def staged(side: Engine) -> StagedTransfers:
    transfers = side._transfers
    assert isinstance(transfers, StagedTransfers)
    transfers.check()
    return transfers


class StagedPair(Pair):
    """Looks after each turn whether every staging block has one holder; at the end, none."""

    tightest: int | None = None
    """Fewest free staging blocks after a turn, on the prefill side."""

    def turn(self) -> None:
        super().turn()
        staged(self.decode)
        free = staged(self.prefill).num_free
        self.tightest = free if self.tightest is None else min(self.tightest, free)

    def close(self) -> None:
        for side in (self.prefill, self.decode):
            assert staged(side).num_free == staged(side)._region.num_blocks
        super().close()


def prefilled(side: Engine, count: int) -> list[Handoff]:
    """What the engine offers until it has nothing to do; `count` of them."""
    handoffs: list[Handoff] = []
    while True:
        for event in side.step():
            assert isinstance(event, Prefilled)
            handoffs += event.handoffs
        if not side.busy:
            assert len(handoffs) == count
            return handoffs


def of_length(num_tokens: int, count: int) -> list[EngineRequest]:
    """Greedy requests with different prompts of one length."""
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return [
        EngineRequest(
            key=f"job:{i}",
            spec=RequestSpec(
                prompt_token_ids=tuple(3 + (i * 31 + t * 7) % 190 for t in range(num_tokens)),
                sampling=sampling,
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("transport", ["mem", "shm", "tcp"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("changes", [{}, SMALL])
def test_a_staged_pair_gives_what_one_engine_gives(model, transport, caching, changes) -> None:
    requests = make_requests(14, temperature=0)
    values = {"enable_prefix_caching": caching, "kv_transport": (transport,), **changes}
    pair = StagedPair(engine("prefill", model, **values), engine("decode", model, **values))
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    stats = pair.decode.stats()
    everything = sum(-(-len(r.spec.prompt_token_ids) // 8) for r in requests)
    assert 0 < stats.pulled_bytes <= everything * BLOCK_BYTES
    if caching:
        assert stats.pulled_bytes < everything * BLOCK_BYTES, "the shared prefix is pulled once"
    pair.close()


def test_a_staged_engine_and_one_that_is_read_directly_agree(model) -> None:
    config = EngineConfig(
        model="tiny", home="unused", role="decode", block_size=8, kv_transport=("shm",)
    )
    direct = build_engine(config, model)
    prefill = engine("prefill", model, kv_transport=("shm",))
    pair = Pair(prefill, direct)
    requests = make_requests(8, temperature=0.9, n=2)
    pair.run(requests)
    assert {key: token_ids(o) for key, o in pair.outputs.items()} == alone(model, requests)
    assert staged(prefill).num_free == 80
    pair.close()


def test_faults_leave_no_staging_block_behind(model) -> None:
    way = MemTransport()
    kinds = ["drop", "die", "stale_epoch", "reuse", "delay"] * 3
    way.faults.extend(Fault(kind, seconds=0.001) for kind in kinds)
    pair = StagedPair(engine("prefill", model, **SMALL), engine("decode", model, [way], **SMALL))
    requests = make_requests(12, temperature=0)
    pair.run(requests)
    assert {key: token_ids(o) for key, o in pair.outputs.items()} == alone(model, requests)
    assert {"PeerLost", "StaleEpoch", "StaleGeneration"} <= set(pair.codes)
    pair.close()


def test_handoffs_without_room_wait_in_order_and_can_be_aborted(model) -> None:
    prefill = engine("prefill", model, **SMALL)
    requests = of_length(64, 5)  # 8 blocks each, 16 staging blocks; one step has room for one
    prefill.handle(Submit(requests))
    first = prefilled(prefill, 2)
    assert [handoff.key for handoff in first] == ["job:0", "job:1"]
    assert staged(prefill).num_free == 0
    assert prefill.stats().pinned_requests == 3, "one waits; the others do not start"
    prefill.handle(Abort(["job:2"]))
    assert prefilled(prefill, 0) == []
    prefill.check()
    prefill.handle(Unpin([first[0].handoff_id]))
    (second,) = prefilled(prefill, 1)
    assert second.key == "job:3"
    prefill.handle(Submit([requests[4]]))  # again, while it waits: one hand-off comes
    assert prefilled(prefill, 0) == []
    assert prefill.stats().pinned_requests == 3
    prefill.handle(Drain())
    assert prefilled(prefill, 0) == [], "not drained while a hand-off waits"
    prefill.handle(Unpin([first[1].handoff_id]))
    last, drained = [event for _ in range(2) for event in prefill.step()]
    assert isinstance(last, Prefilled) and [h.key for h in last.handoffs] == ["job:4"]
    assert isinstance(drained, Drained) and drained.dropped == []
    prefill.handle(Reset(5))
    prefill.check()
    assert staged(prefill).num_free == 16
    assert prefill.stats().used_blocks == 0
    prefill.close()


def test_adoptions_without_room_wait_and_can_be_aborted_and_reset(model) -> None:
    way = MemTransport()
    prefill, decode = engine("prefill", model), engine("decode", model, [way], **SMALL)
    way.faults.extend([Fault("delay", seconds=0.3)] * 2)
    requests = of_length(60, 5)
    prefill.handle(Submit(requests))
    handoffs = prefilled(prefill, 5)
    pair = StagedPair(prefill, decode)
    pair.adopt(handoffs[:4])
    decode.step()
    assert staged(decode).num_free == 0
    assert decode.stats().used_blocks == 16, "two are read, two wait without blocks"
    decode.handle(Abort(["job:3"]))
    (failed,) = decode.step()
    assert isinstance(failed, PullFailed) and (failed.key, failed.code) == ("job:3", "Aborted")
    decode.handle(Reset(9))
    assert staged(decode).num_free == 0, "blocks belong to their pull until it ends"
    while decode.stats().pulling:
        assert select.select([decode.fileno()], [], [], 30)[0]
        assert decode.step() == []
        decode.check()
    assert staged(decode).num_free == 16
    pair.requests = {requests[4].key: requests[4]}
    pair.adopt(handoffs[4:])
    while not pair.outputs:
        pair.turn()
    assert token_ids(pair.outputs["job:4"]) == alone(model, requests[4:])["job:4"]
    prefill.handle(Unpin([handoff.handoff_id for handoff in handoffs]))
    pair.close()


def test_a_reset_prefill_engine_voids_what_it_offered(model) -> None:
    prefill, decode = engine("prefill", model, **SMALL), engine("decode", model)
    requests = of_length(64, 3)
    prefill.handle(Submit(requests))
    handoffs = prefilled(prefill, 2)
    prefill.handle(Reset(2))
    assert staged(prefill).num_free == 16
    pair = StagedPair(prefill, decode)
    pair.requests = {request.key: request for request in requests}
    pair.adopt(handoffs)
    prefill.handle(Submit([requests[2]]))
    while len(pair.outputs) < 3:
        pair.turn()
    assert pair.codes == ["StaleEpoch"] * 2
    assert {key: token_ids(o) for key, o in pair.outputs.items()} == alone(model, requests)
    pair.close()


def test_the_staging_area_holds_a_sequence_and_at_most_the_pool() -> None:
    def blocks(**changes) -> int:
        config = EngineConfig(model="m", home="h", block_size=8, **changes)
        return staging_blocks(config, 100, 1000, 128)

    assert blocks() == 100
    assert blocks(kv_staging_bytes=50_000) == 50
    assert blocks(kv_staging_bytes=1) == 16
    with pytest.raises(ConfigError, match="kv_staging_bytes"):
        blocks(kv_staging_bytes=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("transport", ["mem", "shm", "tcp"])
@pytest.mark.parametrize("changes", [{}, SMALL])
def test_two_engines_on_a_gpu_give_the_tokens_of_generate(transport, changes) -> None:
    reference = tiny_models.make("llama")
    requests = of_length(61, 12)
    expected = {}
    for request in requests:
        ids = torch.tensor([request.spec.prompt_token_ids])
        made = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=6,
            max_new_tokens=6,
            pad_token_id=0,
            eos_token_id=None,
        )
        expected[request.key] = [made[0, 61:].tolist()]
    model = tiny_models.loaded(reference, "cuda:0")
    values = {"kv_transport": (transport,), "device": "cuda:0", **changes}
    pair = StagedPair(engine("prefill", model, **values), engine("decode", model, **values))
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == expected
    assert all(staged(side)._locked for side in (pair.prefill, pair.decode))
    pair.close()


def test_two_engines_share_a_gpu_whichever_comes_first(model, monkeypatch) -> None:
    """What the first one took is not taken off the second one's share once more."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1_000)
    on_gpu = replace(model, device=torch.device("cuda:0"))
    shape = build.runner.kv_shape(model, 8)
    config = EngineConfig(model="m", home="h", gpu_memory_utilization=0.45)
    total = 1000 * BLOCK_BYTES
    for free in (0.9 * total, 0.52 * total):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), total))
        assert build._num_blocks(config, on_gpu, shape) == 449
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(0.2 * total), total))
    assert build._num_blocks(config, on_gpu, shape) in (149, 150)


def test_finished_requests_of_a_prefill_engine_need_no_staging(model) -> None:
    prefill = engine("prefill", model, **SMALL)
    sampling = SamplingParams(temperature=0, max_tokens=1)
    spec = RequestSpec(prompt_token_ids=tuple(range(5, 60)), sampling=sampling)
    prefill.handle(Submit([EngineRequest(key="job:0", spec=spec)]))
    (finished,) = prefill.step()
    assert isinstance(finished, Finished)
    assert staged(prefill).num_free == 16
    prefill.close()
