"""The null engine: real hand-off, no model; also what an engine process costs at most."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    Drain,
    Drained,
    EngineRequest,
    Finished,
    Prefilled,
    Pulled,
    PullFailed,
    Reset,
    Submit,
    Unpin,
)
from pdbatch.engine.null import NullEngine
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams


def null(role: str, **changes) -> NullEngine:
    values = {"model": "null", "home": "unused", "worker": role, "kv_transport": ("shm",)}
    return NullEngine(EngineConfig(**(values | changes), role=role, engine="null"))


def requests(count: int, max_tokens: int | None = 3) -> list[EngineRequest]:
    params = SamplingParams(max_tokens=max_tokens)
    return [
        EngineRequest(key=f"job:{i}", spec=RequestSpec(prompt=f"prompt {i}" * 9, sampling=params))
        for i in range(count)
    ]


def adopt(handoffs) -> Adopt:
    return Adopt([Adoption(handoff.handoff_id, handoff.descriptor) for handoff in handoffs])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_requests_go_through_prefill_and_decode(transport: str) -> None:
    prefill = null("prefill", kv_transport=(transport,), secret="s")
    decode = null("decode", kv_transport=(transport,), secret="s")
    prefill.handle(Submit(requests(20)))
    (prefilled,) = prefill.step()
    assert isinstance(prefilled, Prefilled) and len(prefilled.handoffs) == 20
    assert prefill.stats().pinned_requests == 20
    decode.handle(adopt(prefilled.handoffs))
    pulled, finished = decode.step()
    assert pulled == Pulled([h.handoff_id for h in prefilled.handoffs])
    assert isinstance(finished, Finished)
    assert [o.key for o in finished.outputs] == [f"job:{i}" for i in range(20)]
    output = finished.outputs[3]
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 3
    assert (output.prefill_worker, output.decode_worker) == ("prefill", "decode")
    prefill.handle(Unpin(pulled.handoff_ids))
    for engine in (prefill, decode):
        engine.check()
        assert engine.stats().used_blocks == 0
        engine.close()


def test_one_token_never_leaves_prefill_and_mixed_finishes_all() -> None:
    prefill, mixed = null("prefill"), null("mixed")
    prefill.handle(Submit(requests(2, max_tokens=1)))
    (event,) = prefill.step()
    assert isinstance(event, Finished) and event.outputs[0].decode_worker == ""
    mixed.handle(Submit(requests(2, max_tokens=None)))
    (event,) = mixed.step()
    assert isinstance(event, Finished) and len(event.outputs[0].outputs[0].token_ids) == 2


def test_bytes_that_changed_after_the_pin_are_refused() -> None:
    prefill, decode = null("prefill"), null("decode")
    prefill.handle(Submit(requests(3)))
    (prefilled,) = prefill.step()
    first, second, third = prefilled.handoffs
    blocks = prefill._pins[first.handoff_id]
    prefill._region.block(blocks[0])[0] ^= 1
    prefill.handle(Unpin([second.handoff_id]))
    prefill.handle(Submit(requests(1)))  # takes the block of the second
    prefill.step()
    decode.handle(adopt(prefilled.handoffs))
    pulled, _finished, *failed = decode.step()
    assert pulled == Pulled([third.handoff_id])
    assert all(isinstance(event, PullFailed) for event in failed)
    assert [(f.handoff_id, f.code) for f in failed] == [
        (first.handoff_id, "ChecksumMismatch"),
        (second.handoff_id, "StaleGeneration"),
    ]
    decode.check()


def test_a_reset_makes_everything_stale() -> None:
    prefill, decode = null("prefill"), null("decode")
    prefill.handle(Submit(requests(1)))
    (prefilled,) = prefill.step()
    prefill.handle(Reset(5))
    decode.handle(adopt(prefilled.handoffs))
    (failed,) = decode.step()
    assert isinstance(failed, PullFailed) and failed.code == "StaleEpoch" and failed.key == "job:0"
    assert prefill.stats().pinned_requests == 0


def test_pins_hold_prefill_back_and_drain_drops_what_waits() -> None:
    prefill = null("prefill", num_blocks=10, pinned_share=0.5)
    prefill.handle(Submit(requests(10)))
    (prefilled,) = prefill.step()
    assert len(prefilled.handoffs) == 6
    prefill.handle(Abort(["job:9", "job:0"]))
    prefill.handle(Drain())
    events = prefill.step()
    assert events == [Drained(["job:6", "job:7", "job:8"])]
    prefill.check()


def test_it_loads_no_torch() -> None:
    code = (
        "import sys, pdbatch.engine.null, pdbatch.engine.child;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
