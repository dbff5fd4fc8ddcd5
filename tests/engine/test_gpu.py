"""Engines on GPUs: the tokens of transformers' `generate`, and nothing read or written too early.

With two GPUs prefill runs on the first and decode on the second; with one, both on it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_device_pool import of_length, offered
from test_handoff import Pair, make_requests, token_ids

from pdbatch.engine import fences
from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.handoff import DeviceRegion
from pdbatch.engine.messages import EngineRequest, Submit
from pdbatch.engine.verify_pair import Pair as ProcessPair
from pdbatch.engine.verify_pair import ProcessSide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FIRST, LAST = "cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}"
VALUES: dict[str, Any] = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 8, "secret": "s"}


@pytest.fixture(scope="module")
def reference():
    return tiny_models.make("llama")


def generated(model, requests: list[EngineRequest]) -> dict[str, list[list[int]]]:
    """Greedy outputs of transformers' own `generate`, on the CPU, one prompt at a time."""
    expected = {}
    for request in requests:
        ids = torch.tensor([request.spec.prompt_token_ids])
        count = request.spec.sampling.max_tokens
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            eos_token_id=None,
        )
        expected[request.key] = [made[0, ids.shape[1] :].tolist()]
    return expected


@pytest.mark.parametrize(
    ("transport", "caching"), [("cuda_ipc", True), ("cuda_ipc", False), ("tcp", True)]
)
def test_two_processes_give_the_tokens_of_generate(
    reference, tmp_path: Path, transport: str, caching: bool
) -> None:
    reference.save_pretrained(tmp_path / "tiny")
    requests = make_requests(24, temperature=0, ignore_eos=True)
    base = EngineConfig(
        model=str(tmp_path / "tiny"),
        home=str(tmp_path),
        dtype="float32",
        max_num_batched_tokens=64,
        kv_transport=(transport,),
        enable_prefix_caching=caching,
        **VALUES,
    )
    prefill = replace(base, role="prefill", worker="prefill", device=FIRST)
    decode = replace(base, role="decode", worker="decode", device=LAST, preempt_every_steps=7)
    with ProcessPair(ProcessSide(prefill), ProcessSide(decode)) as pair:
        outputs = pair.run(requests)
        assert pair.finish() is None
    assert {key: token_ids(output) for key, output in outputs.items()} == generated(
        reference, requests
    )
    assert pair.failed_pulls == 0
    moved = [output.transfer for output in outputs.values() if output.transfer]
    assert {transfer.transport for transfer in moved} == {transport}
    stats = pair.decode.stats
    assert stats is not None and sum(t.num_bytes for t in moved) == stats.pulled_bytes
    assert stats.preemptions > 0


def engine(role: str, reference, device: str, **changes) -> Engine:
    """In this process."""
    model = tiny_models.loaded(tiny_models.make("llama"), device)
    values = {**VALUES, "worker": role, "kv_transport": ("cuda_ipc",), "device": device, **changes}
    return build_engine(EngineConfig(model="tiny", home="unused", role=role, **values), model)


def test_the_pool_itself_is_what_peers_read(reference) -> None:
    side = engine("prefill", reference, FIRST)
    region = side._transfers._region
    assert isinstance(region, DeviceRegion) and region.device == FIRST
    pool = side._stepper._model.cache.pool
    assert pool.data_ptr() == region.address and pool.device == torch.device(FIRST)
    side.close()


def test_offering_waits_for_nothing(reference, monkeypatch) -> None:
    """The step is retired, so what the prefill wrote is written: steps alone make marks."""
    made = 0
    make = fences.marker

    def marker(device: str):
        mark = make(device)

        def counted():
            nonlocal made
            made += 1
            return mark()

        return counted

    monkeypatch.setattr(fences, "marker", marker)
    side = engine("prefill", reference, FIRST, max_num_batched_tokens=512)
    side.handle(Submit(of_length(100, 4)))
    assert len(offered(side)) == 4
    assert made == side.stats().steps
    side.close()


def test_a_pull_waits_for_the_engines_stream(reference) -> None:
    """A step that was not waited for still writes blocks that a pull is given."""
    prefill, decode = engine("prefill", reference, FIRST), engine("decode", reference, LAST)
    requests = of_length(61, 3)
    prefill.handle(Submit(requests))
    handoffs = offered(prefill)
    pair = Pair(prefill, decode)
    pair.requests = {request.key: request for request in requests}
    with torch.cuda.device(LAST):
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        decode._transfers._region.tensor.fill_(0x5A)
    pair.adopt(handoffs)
    while len(pair.outputs) < 3:
        pair.turn()
    assert {k: token_ids(o) for k, o in pair.outputs.items()} == generated(reference, requests)
    pair.close()
