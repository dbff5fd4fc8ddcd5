"""The Triton kernels against float64 by the book: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_attention import BLOCK, WORK, Case, _by_the_book
from triton_machine import DEVICE, GPU, marks

from pdbatch.engine.attention import decodes, prepare, triton_step, work
from pdbatch.engine.attention.upload import Upload

pytestmark = marks
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if GPU else [])
SHAPES = [(1, 1, 16), (3, 3, 64), (2, 4, 80), (1, 7, 128)]
if GPU:
    SHAPES += [(8, 4, 128), (2, 16, 96), (4, 1, 256), (1, 12, 64)]
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
MIXED = {
    **WORK,
    "long": ([(n, 1) for n in (700, 3, 450)] + [(100, 60), (0, 80), (0, 33)], (0, 0)),
    "families": ([(n, 1) for n in (330, 361, 340, 328, 335, 345, 700, 390, 50)], (9, 5)),
}


def _sizes(case: Case, windowed: bool = True) -> decodes.Sizes:
    """In bfloat16 chunks without a prefix are the paged kernel's, else FlashAttention's."""
    return decodes.Sizes(
        num_q_heads=case.heads * case.group,
        shape=case.cache.shape,
        processors=16,
        windowed=windowed,
        packed=case.cache.pool.dtype != torch.bfloat16,
    )


def _batch(case: Case, kind: str):
    ordered, shared = MIXED[kind]
    ordered = sorted(ordered, key=lambda w: not (w[1] == 1 and w[0]))
    batch = case.build(ordered, shared)
    if kind == "families":  # all share 5 blocks, the first eight 40
        batch.block_tables_SM[:8, :40] = batch.block_tables_SM[0, :40]
    return batch


def _fill(case: Case, batch) -> None:
    """Random numbers where tokens are, NaN everywhere else."""
    pool, gone = case.cache.pool, float("nan")
    pool.fill_(gone)
    for seq, length in enumerate(batch.context_lens):
        queries = batch.cu_seqlens_q[seq + 1] - batch.cu_seqlens_q[seq]
        used = batch.block_tables_SM[seq, : -(-length // BLOCK)].long()
        fresh = torch.randn(len(used), *pool.shape[1:]).to(pool)
        before = length - queries
        for at, block in enumerate(used.tolist()):
            end = min(BLOCK, before - at * BLOCK)
            if end > 0 and pool[block, 0, 0, 0, end - 1].isnan().any():
                pool[block, ..., :end, :] = fresh[at, ..., :end, :]


def _error(case: Case, batch, got, q, scaling, window, softcap) -> float:
    clean = case.cache.pool.clone()
    case.cache.pool.nan_to_num_(0.0)
    want = _by_the_book(case, batch, 1, q, scaling, window, softcap)
    case.cache.pool.copy_(clean)
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0), (333, 5.0)])
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("kind", MIXED)
def test_kernels_are_those_of_the_book(kind, heads, window, softcap, dtype) -> None:
    slow = heads != (3, 3, 64) or kind in ("decodes", "chunks", "long")
    if not GPU and slow and (window, softcap, dtype) != (333, 5.0, torch.bfloat16):
        pytest.skip("the interpreter is slow")
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")  # shown when the test fails
    case = Case(seed, *heads, dtype, DEVICE)
    batch = _batch(case, kind)
    _fill(case, batch)
    q, k, v = case.inputs(batch)
    scaling = 1.3 * case.size**-0.5
    step = prepare.eager(batch, _sizes(case), Upload(torch.device(DEVICE)))
    attention = triton_step.TritonStep(case.cache, step.tables)
    got = attention.attend(1, q, k, v, scaling=scaling, window=window, softcap=softcap)
    error = _error(case, batch, got, q, scaling, window, softcap)
    assert error < ERROR[dtype], f"relative error {error:.2e}"
    if dtype == torch.bfloat16:
        assert not attention.reads_projections
    if kind == "families":
        assert step.tables.shared is not None


@pytest.mark.parametrize("kind", ["decodes", "families", "split"])
def test_padded_places_give_the_same(kind: str) -> None:
    case = Case(5, 2, 4, 64, torch.float32, DEVICE)
    split = [(n, 1) for n in (900, 40, 1000)]
    batch = case.build(split) if kind == "split" else _batch(case, kind)
    _fill(case, batch)
    q, k, v = case.inputs(batch)
    rows, sizes, upload = 16, _sizes(case), Upload(torch.device(DEVICE))
    captured = prepare.Captured(sizes, upload, rows, 300)
    captured._buffer.fill_(-7)
    plan = decodes.plan(batch, sizes, rows)
    expected = {"decodes": "split", "families": "shared", "split": "split"}[kind]
    assert plan.kind == expected
    captured.fill(batch, plan, rows)
    step = captured.step(batch, plan, rows)
    wide = [torch.zeros(x.shape[0], rows, x.shape[2]).to(x) for x in (q, k, v)]
    for padded, real in zip(wide, (q, k, v), strict=True):
        padded[:, : real.shape[1]] = real
    for window in (None, 20):
        attention = triton_step.TritonStep(case.cache, step.tables)
        got = attention.attend(1, *wide, scaling=0.1, window=window, softcap=None)
        assert not got[q.shape[1] :].any(), "padding gives zeros"
        error = _error(case, batch, got[: q.shape[1]], q, 0.1, window, None)
        assert error < 1e-5, f"relative error {error:.2e}"


def test_new_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    case = Case(1, 2, 2, 16, torch.float32, DEVICE)
    case.cache.pool.zero_()
    batch = case.build([(12, 1), (0, 9)])
    q, k, v = case.inputs(batch)
    step = prepare.eager(batch, _sizes(case), Upload(torch.device(DEVICE)))
    attention = triton_step.TritonStep(case.cache, step.tables)
    attention.attend(1, q, k, v, scaling=1.0, window=None, softcap=None)
    for token, slot in enumerate(batch.slot_mapping_T.tolist()):
        found = case.cache.pool[slot // BLOCK, :, :, :, slot % BLOCK]
        assert torch.equal(found[1, 0], k[:, token]) and torch.equal(found[1, 1], v[:, token])
    assert case.cache.pool[:, 0].count_nonzero() == 0
    assert case.cache.pool.count_nonzero() == 2 * k.numel()


def test_decodes_are_cut_evenly_and_wholly() -> None:
    rng = np.random.default_rng(3)
    for aim in (16, 66, 132):
        lens = rng.integers(0, 5000, 40).astype(np.int32)
        skipped = np.where(rng.random(40) < 0.3, lens // 2, 0).astype(np.int32)
        items = work.decode_items(lens, skipped, aim)
        assert len(items.items_I4) <= len(lens) + aim
        seen = {row: [] for row in range(40)}
        for row, start, end, part in items.items_I4.tolist():
            seen[row].append((start, end))
            inside = items.row_parts[row] <= part < items.row_parts[row + 1]
            assert inside if part >= 0 else skipped[row] == 0
        for row, pieces in seen.items():
            pieces.sort()
            assert pieces[0][0] == skipped[row] and pieces[-1][1] == lens[row]
            assert all(a[1] == b[0] for a, b in pairwise(pieces))
            parts = items.row_parts[row + 1] - items.row_parts[row]
            assert parts == (len(pieces) if len(pieces) > 1 or skipped[row] else 0)
