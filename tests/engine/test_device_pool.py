"""Pools on a device: who waits for what, and the same tokens as one engine gives.

On the CPU a tensor plays the device's memory, and marks that a test opens play its stream.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable

import pytest
import tiny_models
import torch
from test_handoff import Pair, alone, make_requests, token_ids

from kvxfer import DeviceRegion, MemTransport
from kvxfer.transports import Fault
from pdbatch.engine import fences, ways
from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.messages import (
    Abort,
    EngineRequest,
    Handoff,
    Prefilled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_models.loaded(tiny_models.make("llama"))


def played_region(config: EngineConfig, num_blocks: int, block_bytes: int, device: str):
    """What `make_region` gives on a GPU, over a tensor of the host."""
    assert device == "cpu"
    tensor = torch.zeros(num_blocks * block_bytes, dtype=torch.uint8)
    return DeviceRegion(tensor, num_blocks, block_bytes, epoch=config.epoch)


def engine(role: str, model, ways=None, *, region=played_region, **changes) -> Engine:
    values = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 8, "kv_transport": ("mem",)}
    values |= {"worker": role, "secret": "s", "max_num_batched_tokens": 64}
    config = EngineConfig(model="tiny", home="unused", role=role, **(values | changes))
    return build_engine(config, model, ways=ways, region=region)


def offered(side: Engine) -> list[Handoff]:
    """What the engine offers until it has nothing to do."""
    handoffs: list[Handoff] = []
    while True:
        for event in side.step():
            assert isinstance(event, Prefilled)
            handoffs += event.handoffs
        if not side.busy:
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


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "n": 3}])
def test_a_pair_over_tensors_gives_what_one_engine_gives(model, caching, sampling) -> None:
    requests = make_requests(14, **sampling)
    pair = Pair(
        engine("prefill", model, enable_prefix_caching=caching),
        engine("decode", model, enable_prefix_caching=caching),
    )
    for side in (pair.prefill, pair.decode):
        region = side._transfers._region
        assert isinstance(region, DeviceRegion)
        pool = side._stepper._model.cache.pool
        assert pool.data_ptr() == region.address, "the pool itself is what peers read"
        assert pool.nbytes == region.num_bytes
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    assert pair.decode.stats().pulled_bytes > 0 and not pair.codes
    pair.close()


def test_every_fault_ends_in_a_new_prefill_and_the_same_tokens(model) -> None:
    way = MemTransport()
    pair = Pair(engine("prefill", model), engine("decode", model, ways=[way]))
    way.faults.extend(Fault(kind, seconds=0.001) for kind in ["drop", "die", "reuse"] * 3)
    requests = make_requests(8, temperature=0)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone(
        model, requests
    )
    assert len(pair.codes) >= 9, "a reused block may be in several prompts"
    pair.close()


def test_a_reset_prefill_engine_voids_what_it_offered(model) -> None:
    prefill, decode = engine("prefill", model), engine("decode", model)
    requests = of_length(64, 3)
    prefill.handle(Submit(requests))
    handoffs = offered(prefill)
    prefill.handle(Reset(2))
    pair = Pair(prefill, decode)
    pair.requests = {request.key: request for request in requests}
    pair.adopt(handoffs)
    while len(pair.outputs) < 3:
        pair.turn()
    assert pair.codes == ["StaleEpoch"] * 3
    assert {key: token_ids(o) for key, o in pair.outputs.items()} == alone(model, requests)
    pair.close()


def test_blocks_that_were_taken_again_are_found_out(model) -> None:
    prefill, decode = engine("prefill", model, num_blocks=16), engine("decode", model)
    requests = of_length(64, 3)
    prefill.handle(Submit(requests[:1]))
    handoffs = offered(prefill)
    prefill.handle(Unpin([handoffs[0].handoff_id]))
    prefill.handle(Submit(requests[1:]))  # 16 blocks: all are taken again
    offered(prefill)
    pair = Pair(prefill, decode)
    pair.adopt(handoffs)
    while not pair.codes:
        for event in decode.step():
            assert isinstance(event, PullFailed)
            pair.codes.append(event.code)
    assert pair.codes == ["StaleGeneration"]
    assert decode.stats().used_blocks == 0


class Stream:
    """Marks that are reached when the test says so."""

    def __init__(self) -> None:
        self.made = 0
        self.waited: list[str] = []
        """Threads that waited, in order."""
        self.reached = threading.Event()

    def mark(self) -> Callable[[], None]:
        self.made += 1
        return self._wait

    def _wait(self) -> None:
        assert self.reached.wait(30)
        self.waited.append(threading.current_thread().name)


def with_stream(monkeypatch, stream: Stream) -> None:
    """Engines built from now on run on it."""
    monkeypatch.setattr(fences, "marker", lambda device: stream.mark)


def test_nothing_is_offered_before_its_prefill_is_over(model, monkeypatch) -> None:
    stream = Stream()
    with_stream(monkeypatch, stream)
    prefill = engine("prefill", model)
    prefill.handle(Submit(of_length(20, 1)))
    steps = threading.Thread(target=prefill.step, name="engine")
    steps.start()
    steps.join(0.2)
    producer = prefill._transfers._producer
    assert steps.is_alive() and stream.made == 1, "the step waits for the mark"
    assert producer is not None and producer.num_pinned == 0, "and nothing is described yet"
    stream.reached.set()
    steps.join(30)
    assert producer.num_pinned == 1 and stream.waited == ["engine"]
    prefill.close()


def test_a_pull_waits_for_what_the_engine_has_under_way(model, monkeypatch) -> None:
    """Blocks of a dropped sequence may still be written by a step that was not waited for."""
    prefill = engine("prefill", model)
    stream = Stream()
    with_stream(monkeypatch, stream)
    decode = engine("decode", model)
    requests = of_length(40, 1)
    prefill.handle(Submit(requests))
    handoffs = offered(prefill)
    pair = Pair(prefill, decode)
    pair.requests = {requests[0].key: requests[0]}
    pair.adopt(handoffs)
    decode.step()
    (table,) = decode._adoptions.tables
    region = decode._transfers._region
    old = b"\x5a" * region.block_bytes
    for block in table:  # the late writes of the step
        region.tensor.view(-1, region.block_bytes)[block] = 0x5A
    assert stream.made == 1 and not select.select([decode.fileno()], [], [], 0.2)[0]
    assert all(bytes(region.block(block)) == old for block in table), "not a byte was read yet"
    stream.reached.set()
    while not pair.outputs:
        pair.turn()
    assert stream.waited[0].startswith("pdbatch-pull")
    assert token_ids(pair.outputs["job:0"]) == alone(model, requests)["job:0"]
    pair.close()


def test_an_aborted_pull_keeps_its_blocks_until_it_is_over(model, monkeypatch) -> None:
    prefill = engine("prefill", model)
    stream = Stream()
    with_stream(monkeypatch, stream)
    decode = engine("decode", model)
    requests = of_length(40, 1)
    prefill.handle(Submit(requests))
    handoffs = offered(prefill)
    pair = Pair(prefill, decode)
    pair.adopt(handoffs)
    decode.step()
    decode.handle(Abort(["job:0"]))
    (failed,) = decode.step()
    assert isinstance(failed, PullFailed) and failed.code == "Aborted"
    decode.handle(Reset(3))
    assert decode.stats().used_blocks == 5, "the read may still write them"
    decode.check()
    stream.reached.set()
    while decode.stats().pulling:
        assert select.select([decode.fileno()], [], [], 30)[0]
        assert decode.step() == []
    assert decode.stats().used_blocks == 0
    prefill.handle(Unpin([handoffs[0].handoff_id]))
    pair.close()


class Played:
    """A way that a rehearsal tries."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error
        self.calls: list[str] = []

    def serve(self, region) -> dict[str, str]:
        self.calls.append("serve")
        return {"region": region.id}

    def read(self, address, plan, destination, timeout_s) -> None:
        self.calls.append("read")
        assert address == {"region": destination.id} and plan.pieces() == [(0, 64, 64)]
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.calls.append("close")


def test_a_kernel_is_compiled_before_the_first_pull(monkeypatch) -> None:
    config = EngineConfig(model="m", home="h", role="decode")
    region = played_region(config, 4, 64, "cpu")
    ipc, tcp, own = Played("cuda_ipc"), Played("tcp"), Played("cuda_ipc")
    monkeypatch.setattr(ways, "open_transport", lambda name, **_: own)
    assert ways.rehearsed([ipc, tcp], config, region) == [ipc, tcp] and not own.calls
    region.device = "cuda:0"
    assert ways.rehearsed([tcp], config, region) == [tcp] and not own.calls
    assert ways.rehearsed([ipc, tcp], config, region) == [ipc, tcp]
    assert own.calls == ["serve", "read", "close"] and not ipc.calls
    own.error = RuntimeError("no C compiler")
    assert ways.rehearsed([ipc, tcp], config, region) == [tcp] and ipc.calls == ["close"]
    assert ways.rehearsed([ipc], config, region) == [ipc], "asked for alone: it shall say so itself"
