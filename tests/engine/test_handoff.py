"""Two engines and a real hand-off: the same tokens as one engine alone, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import select

import pytest
import tiny_models
import torch

from kvxfer.transports import Fault, MemTransport
from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    EngineRequest,
    Event,
    Finished,
    Handoff,
    Prefilled,
    Pulled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.sampling import SamplingParams

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_models.loaded(tiny_models.make("llama"))


def engine(role: str, model, ways=None, **changes) -> Engine:
    values = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 8, "kv_transport": ("mem",)}
    values |= {"worker": role, "secret": "s", "max_num_batched_tokens": 64}
    config = EngineConfig(model="tiny", home="unused", role=role, **(values | changes))
    return build_engine(config, model, ways=ways)


def make_requests(count: int, seed: int = 3, **params) -> list[EngineRequest]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 199) for _ in range(40)]
    made = []
    for index in range(count):
        own = [rng.randrange(3, 199) for _ in range(rng.randrange(1, 60))]
        prompt = (shared if index % 2 else []) + own
        sampling = SamplingParams(max_tokens=rng.randrange(2, 12), **params)
        spec = RequestSpec(prompt_token_ids=tuple(prompt), sampling=sampling)
        made.append(EngineRequest(key=f"job:{index}", spec=spec))
    return made


def alone(model, requests: list[EngineRequest]) -> dict[str, list[list[int]]]:
    """What one engine gives, request after request."""
    mixed = engine("mixed", model, enable_prefix_caching=False)
    tokens = {}
    for request in requests:
        mixed.add(request)
        while request.key not in tokens:
            for event in mixed.step():
                assert isinstance(event, Finished)
                tokens |= {o.key: token_ids(o) for o in event.outputs}
    return tokens


def token_ids(output: RequestOutput) -> list[list[int]]:
    assert output.error is None, output
    return [completion.token_ids for completion in output.outputs]


class Pair:
    """A prefill and a decode engine, and what their main processes would do between them."""

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        self.prefill, self.decode = prefill, decode
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.codes: list[str] = []

    def run(self, requests: list[EngineRequest]) -> None:
        self.requests |= {request.key: request for request in requests}
        self.prefill.handle(Submit(requests))
        while len(self.outputs) < len(self.requests):
            self.turn()

    def turn(self) -> None:
        for side in (self.prefill, self.decode):
            for event in side.step():
                self.on_event(event)
            side.check()
        if not (self.prefill.busy or self.decode.busy):
            assert select.select([self.decode.fileno()], [], [], 30)[0], "nothing happens"

    def on_event(self, event: Event) -> None:
        match event:
            case Prefilled(handoffs):
                self.adopt(handoffs)
            case Pulled(ids):
                self.prefill.handle(Unpin(ids))
            case PullFailed(handoff_id, key, code, _):
                self.codes.append(code)
                self.prefill.handle(Unpin([handoff_id]))
                self.prefill.handle(Submit([self.requests[key]]))
            case Finished(outputs):
                for output in outputs:
                    assert output.key not in self.outputs
                    self.outputs[output.key] = output

    def adopt(self, handoffs: list[Handoff]) -> None:
        self.decode.handle(Adopt([Adoption(h.handoff_id, h.descriptor) for h in handoffs]))

    def close(self) -> None:
        for side in (self.prefill, self.decode):
            side.check()
            assert side.stats().used_blocks == 0
            side.close()


@pytest.mark.parametrize("transport", ["mem", "shm", "tcp"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "n": 3}])
def test_a_pair_gives_what_one_engine_gives(model, transport, caching, sampling) -> None:
    requests = make_requests(14, **sampling)
    ways = {"enable_prefix_caching": caching, "kv_transport": (transport,)}
    pair = Pair(engine("prefill", model, **ways), engine("decode", model, **ways))
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    stats = pair.decode.stats()
    everything = sum(-(-len(r.spec.prompt_token_ids) // 8) for r in requests)
    assert 0 < stats.pulled_bytes <= everything * pair.decode.info.block_bytes
    if caching:
        saved = everything - stats.pulled_bytes // pair.decode.info.block_bytes
        assert saved >= 5 * 5  # five full blocks of the shared prefix, pulled once or twice
    for output in pair.outputs.values():
        assert output.times.engine_s > 0 and output.times.handoff_s >= 0
        if output.transfer is not None:
            assert output.transfer.transport == transport and output.times.transfer_s > 0
    moved = [output.transfer.num_bytes for output in pair.outputs.values() if output.transfer]
    assert sum(moved) == stats.pulled_bytes
    pair.close()


@pytest.mark.parametrize("transport", ["mem", "shm", "tcp"])
@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (16, 8), (4, 64), (64, 4)])
@pytest.mark.parametrize("checksum", [False, True])
def test_block_sizes_may_differ(model, transport, theirs, ours, checksum) -> None:
    """Leading blocks that the reader has already are counted in its own blocks."""
    requests = make_requests(10, temperature=0)
    ways = {"kv_transport": (transport,), "num_blocks": 160, "kv_checksum": checksum}
    prefill = engine("prefill", model, block_size=theirs, **ways)
    decode = engine("decode", model, block_size=ours, **ways)
    assert prefill.info.layout == decode.info.layout
    pair = Pair(prefill, decode)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    per_token = decode.info.block_bytes // ours
    everything = sum(len(r.spec.prompt_token_ids) for r in requests) * per_token
    saved = everything - decode.stats().pulled_bytes
    assert saved >= (0 if ours == 64 else 4 * (40 // ours) * ours * per_token)
    assert not pair.codes
    pair.close()


def test_every_fault_ends_in_a_new_prefill_and_the_same_tokens(model) -> None:
    way = MemTransport()
    prefill = engine("prefill", model)
    decode = engine("decode", model, ways=[way])
    kinds = ["drop", "die", "stale_epoch", "reuse", "delay"] * 3
    way.faults.extend(Fault(kind, seconds=0.001) for kind in kinds)
    pair = Pair(prefill, decode)
    requests = make_requests(12, temperature=0)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    assert sorted(set(pair.codes)) == [
        "PeerLost",
        "StaleEpoch",
        "StaleGeneration",
        "TransferTimeout",
    ]
    pair.close()


@pytest.mark.parametrize("block_size", [8, 32])
def test_damaged_kv_is_prefilled_again_where_checksums_are_sent(model, block_size) -> None:
    way = MemTransport()
    prefill = engine("prefill", model, kv_checksum=True)
    decode = engine("decode", model, ways=[way], block_size=block_size)
    way.faults.extend([Fault("corrupt")] * 5)
    pair = Pair(prefill, decode)
    requests = make_requests(8, temperature=0)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    assert pair.codes == ["ChecksumMismatch"] * 5
    pair.close()


def test_prompts_go_without_checksums_where_there_is_no_memory_for_them(model, monkeypatch) -> None:
    from kvxfer import producer

    real, calls = producer.block_sums, []

    def starved(*args):
        calls.append(args)
        if len(calls) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(producer, "block_sums", starved)
    pair = Pair(engine("prefill", model, kv_checksum=True), engine("decode", model))
    requests = make_requests(6, temperature=0)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    assert len(calls) == 6 and not pair.codes
    pair.close()


def test_preemption_on_the_decode_side_changes_nothing(model) -> None:
    decode = engine("decode", model, num_blocks=26, max_num_seqs=6)
    decode.scheduler.foresees = False  # else it foresees that the pool will not do
    pair = Pair(engine("prefill", model), decode)
    requests = [
        EngineRequest(
            key=f"job:{i}",
            spec=RequestSpec(
                prompt_token_ids=tuple(range(5 + i, 25 + i)),
                sampling=SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
            ),
        )
        for i in range(6)
    ]
    pair.run(requests)
    assert decode.stats().preemptions > 0
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    pair.close()


def test_abort_and_reset_while_pulls_are_under_way(model) -> None:
    way = MemTransport()
    prefill, decode = engine("prefill", model), engine("decode", model, ways=[way])
    way.faults.extend([Fault("delay", seconds=0.3)] * 4)
    requests = make_requests(4, temperature=0)
    prefill.handle(Submit(requests))
    handoffs: list[Handoff] = []
    while len(handoffs) < 4:
        for event in prefill.step():
            assert isinstance(event, Prefilled)
            handoffs += event.handoffs
    pair = Pair(prefill, decode)
    pair.adopt(handoffs)
    decode.step()
    used = decode.stats().used_blocks
    assert used > 0
    decode.handle(Abort(["job:0"]))
    (failed,) = decode.step()
    assert isinstance(failed, PullFailed) and failed.code == "Aborted"
    decode.handle(Reset(9))
    assert decode.stats().used_blocks > 0, "blocks belong to their pull until it ends"
    decode.check()
    while decode.stats().pulling:
        assert select.select([decode.fileno()], [], [], 30)[0]
        assert decode.step() == []
    prefill.handle(Unpin([handoff.handoff_id for handoff in handoffs]))
    pair.close()


def test_garbage_and_foreign_layouts_are_refused(model) -> None:
    prefill = engine("prefill", dataclasses.replace(model, name="another"))
    decode = engine("decode", model)
    decode.handle(Adopt([Adoption("job:7/x", b"no descriptor")]))
    (failed,) = decode.step()
    assert isinstance(failed, PullFailed)
    assert (failed.key, failed.code) == ("job:7", "BadDescriptor")
    prefill.handle(Submit(make_requests(1)))
    (prefilled,) = prefill.step()
    decode.handle(Adopt([Adoption(h.handoff_id, h.descriptor) for h in prefilled.handoffs]))
    (failed,) = decode.step()
    assert failed.code == "LayoutMismatch"
    assert os.getpid() == decode.info.pid
