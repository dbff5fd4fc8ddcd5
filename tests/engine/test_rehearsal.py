"""Steps that stand for those to come."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from pdbatch.engine import rehearsal
from pdbatch.engine.attention import decodes, prepare
from pdbatch.engine.attention.equal import EqualPrompts
from pdbatch.engine.attention.upload import Upload
from pdbatch.engine.kvcache import KVShape


def _sizes(block_size: int = 16) -> decodes.Sizes:
    shape = KVShape(
        num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, block_size=block_size
    )
    return decodes.Sizes(num_q_heads=32, shape=shape, processors=132, windowed=False)


@pytest.mark.parametrize(
    ("rows", "most_keys", "kinds"),
    [
        (512, 4096, ["whole", "split", "shared"]),
        (2, 4096, ["whole", "split", "shared"]),
        (1, 4096, ["whole", "split"]),
        (48, 300, ["whole", "split", "shared"]),
        (48, 64, ["whole"]),
    ],
)
def test_decodes_of_every_kind_that_there_can_be(rows: int, most_keys: int, kinds: list) -> None:
    sizes = _sizes()
    found = list(rehearsal.decoding(rows, sizes, most_keys))
    assert [decodes.plan(batch, sizes, rows).kind for batch in found] == kinds
    for batch in found:
        assert batch.num_decodes == len(batch.context_lens) == rows
        assert max(batch.context_lens) <= most_keys
        assert (batch.slot_mapping_T == -1).all() and not batch.block_tables_SM.any()


def test_prompts_come_alone_after_others_and_beside_decodes() -> None:
    sizes = _sizes()
    found = list(rehearsal.mixed(sizes, 4096))
    assert [batch.num_decodes for batch in found] == [0, 0, 0, 16, 16, 16]
    for batch in found:
        counts = [b - a for a, b in zip(batch.cu_seqlens_q, batch.cu_seqlens_q[1:], strict=False)]
        assert counts[: batch.num_decodes] == [1] * batch.num_decodes
        assert all(counts), "no empty chunk"
        assert len(batch.input_ids_T) == batch.cu_seqlens_q[-1]
    assert len(list(rehearsal.mixed(sizes, 12))) == 1


def test_equal_prompts_are_rehearsed_where_they_go_as_a_batch() -> None:
    sizes = dataclasses.replace(_sizes(), equal=EqualPrompts(), packed=False)
    *_, batch = rehearsal.mixed(sizes, 4096)
    tables = prepare.eager(batch, sizes, Upload(torch.device("cpu"))).tables
    (run,) = tables.runs
    assert run.equal is sizes.equal and run.longest * 4 == run.end == len(batch.input_ids_T)
    assert tables.tiles_X2 is None
    *_, batch = rehearsal.mixed(sizes, 255)
    tables = prepare.eager(batch, sizes, Upload(torch.device("cpu"))).tables
    assert not tables.runs and tables.tiles_X2 is not None, "else all are the paged kernel's"


@pytest.mark.parametrize(
    ("seqs", "tokens", "most_keys", "rows", "total"),
    [(512, 16384, 8192, 512, 16384), (512, 100, 8192, 100, 100), (3, 1000, 64, 3, 192)],
)
def test_the_largest_step(seqs: int, tokens: int, most_keys: int, rows: int, total: int) -> None:
    batch = rehearsal.largest(seqs, tokens, most_keys, 16)
    assert len(batch.logits_indices) == len(batch.context_lens) == rows
    assert batch.cu_seqlens_q[-1] == len(batch.input_ids_T) == total
    assert max(batch.context_lens) <= most_keys and min(batch.context_lens) > 0
    assert (batch.slot_mapping_T == -1).all() and not batch.block_tables_SM.any()
