"""Paged attention against float64 by the book, over random batches and head shapes."""

from __future__ import annotations

import random

import pytest
import torch

from pdbatch.engine.attention import paged, plan
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.model_input import ModelInput

BLOCK = 8
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


class Case:
    """Sequences of random keys in a cache; `shared` of them begin with the same blocks."""

    def __init__(self, seed: int, heads: int, group: int, size: int, dtype, device: str) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.heads, self.group, self.size = heads, group, size
        shape = KVShape(
            num_layers=2, num_kv_heads=heads, head_dim=size, dtype=dtype, block_size=BLOCK
        )
        self.cache = PagedKVCache(shape, 400, device)
        self.cache.pool.fill_(float("nan"))
        self.free = self.rng.sample(range(400), 400)

    def build(self, work: list[tuple[int, int]], shared: tuple[int, int] = (0, 0)) -> ModelInput:
        """`work` is (tokens in the cache before, tokens now); `shared` is (sequences, blocks)."""
        prefix = [self.free.pop() for _ in range(shared[1])]
        tables, slots, offsets = [], [], [0]
        for seq, (before, now) in enumerate(work):
            table = list(prefix) if seq < shared[0] else []
            while len(table) * BLOCK < before + now:
                table.append(self.free.pop())
            tables.append(table)
            slots += [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(before, before + now)]
            offsets.append(len(slots))
        longest = max(map(len, tables))
        return ModelInput(
            input_ids_T=torch.zeros(len(slots), dtype=torch.int64),
            positions_T=torch.zeros(len(slots), dtype=torch.int64),
            slot_mapping_T=torch.tensor(slots),
            cu_seqlens_q=offsets,
            context_lens=[before + now for before, now in work],
            block_tables_SM=torch.tensor(
                [table + [0] * (longest - len(table)) for table in tables], dtype=torch.int32
            ),
            logits_indices=[],
            num_decodes=sum(now == 1 and before > 0 for before, now in work),
        )

    def fill(self, batch: ModelInput) -> None:
        """Random keys and values where the cache already holds tokens; blocks are cleared first."""
        pool = self.cache.pool
        used = {int(b) for row in batch.block_tables_SM for b in row}
        self.cache.clear_blocks(sorted(used))
        for seq, length in enumerate(batch.context_lens):
            queries = batch.cu_seqlens_q[seq + 1] - batch.cu_seqlens_q[seq]
            for at in range(length - queries):
                block = int(batch.block_tables_SM[seq, at // BLOCK])
                if not pool[block, ..., at % BLOCK, :].any():
                    pool[block, ..., at % BLOCK, :] = torch.randn(2, 2, self.heads, self.size)

    def inputs(self, batch: ModelInput) -> tuple[torch.Tensor, ...]:
        count = batch.cu_seqlens_q[-1]
        kind = {"dtype": self.cache.shape.dtype, "device": self.cache.device}
        return tuple(
            torch.randn(count, heads, self.size).transpose(0, 1).to(**kind)
            for heads in (self.heads * self.group, self.heads, self.heads)
        )


def _by_the_book(case: Case, batch: ModelInput, layer: int, q, scaling, window, softcap):
    """Sequence by sequence, head by head, in float64, out of the cache as it is now."""
    out = torch.empty(q.shape[1], q.shape[0], case.size, dtype=torch.float64)
    keys, values = (x.double().cpu() for x in case.cache.layer(layer))
    for seq, length in enumerate(batch.context_lens):
        begin, end = batch.cu_seqlens_q[seq], batch.cu_seqlens_q[seq + 1]
        table = batch.block_tables_SM[seq].long()
        k = keys[table].transpose(0, 1).flatten(1, 2)[:, :length]
        v = values[table].transpose(0, 1).flatten(1, 2)[:, :length]
        for head in range(q.shape[0]):
            scores = q[head, begin:end].double().cpu() @ k[head // case.group].T * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            query_at = torch.arange(length - (end - begin), length)[:, None]
            key_at = torch.arange(length)
            hidden = key_at > query_at
            if window is not None:
                hidden |= key_at <= query_at - window
            scores = scores.masked_fill(hidden, float("-inf"))
            out[begin:end, head] = torch.softmax(scores, -1) @ v[head // case.group]
    return out


WORK = {
    "decodes": ([(n, 1) for n in (1, 7, 8, 100, 33, 250, 64, 15)], (0, 0)),
    "chunks": ([(0, 5), (0, 130), (40, 17), (8, 140), (200, 1), (0, 1)], (0, 0)),
    "both": ([(30, 1), (129, 1), (0, 40), (64, 30)], (0, 0)),
    "shared": ([(n, 1) for n in (130, 161, 140, 128, 135, 20)], (5, 16)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0), (33, 5.0)])
@pytest.mark.parametrize("heads", [(1, 1, 16), (3, 3, 64), (2, 4, 80)])
@pytest.mark.parametrize("kind", WORK)
def test_attention_is_that_of_the_book(kind, heads, window, softcap, dtype, device) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")  # shown when the test fails
    case = Case(seed, *heads, dtype, device)
    work, shared = WORK[kind]
    batch = case.build(sorted(work, key=lambda w: not (w[1] == 1 and w[0])), shared)
    case.fill(batch)
    q, k, v = case.inputs(batch)
    scaling = 1.3 * case.size**-0.5
    step = paged.PagedStep(case.cache, batch, paged.Workspace())
    got = step.attend(1, q, k, v, scaling=scaling, window=window, softcap=softcap)
    want = _by_the_book(case, batch, 1, q, scaling, window, softcap)
    error = (got.double().cpu() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1.2e-2), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_every_number_of_queries_after_a_prefix(device: str, dtype: torch.dtype) -> None:
    """Also those that leave one row for a kernel's last tile."""
    torch.manual_seed(0)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for queries in (1, 2, 31, 32, 33, 63, 64, 65, 66, 97, 128, 129, 193, 705):
        keys = queries + 130
        q = torch.randn(2, 3, queries, 64)
        k, v = torch.randn(2, 2, keys, 64)
        seen = torch.ones(queries, keys).tril(keys - queries).bool()
        mask = torch.zeros(queries, keys).masked_fill(~seen, float("-inf"))
        given = [x.to(device, dtype) for x in (q, k, v, mask)]
        found = paged.chunk_attention(*given, 0.125, None).double().cpu()
        exact_q, exact_k, exact_v = (x.double().cpu() for x in given[:3])
        scores = torch.einsum("hgqd,hcd->hgqc", exact_q, exact_k) * 0.125
        probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("hgqc,hcd->hgqd", probs, exact_v)
        assert (found - expected).abs().max() < bound, queries


def test_new_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    case = Case(1, 2, 2, 16, torch.float32, "cpu")
    batch = case.build([(12, 1), (0, 9)])
    case.cache.clear_blocks(range(400))
    q, k, v = case.inputs(batch)
    step = paged.PagedStep(case.cache, batch, paged.Workspace())
    step.attend(1, q, k, v, scaling=1.0, window=None, softcap=None)
    for token, slot in enumerate(batch.slot_mapping_T.tolist()):
        found = case.cache.pool[slot // BLOCK, :, :, :, slot % BLOCK]
        assert torch.equal(found[1, 0], k[:, token]) and torch.equal(found[1, 1], v[:, token])
    assert case.cache.pool[:, 0].count_nonzero() == 0
    assert case.cache.pool.count_nonzero() == 2 * k.numel()


def test_blocks_are_cleared_when_they_begin() -> None:
    case = Case(2, 2, 2, 16, torch.float32, "cpu")
    slots = torch.tensor([3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK + 2, 9 * BLOCK])
    paged.start_blocks(case.cache, slots)
    clean = [b for b in range(400) if not case.cache.pool[b].isnan().any()]
    assert clean == [3, 9]


def test_a_long_common_beginning_is_read_once_for_its_family() -> None:
    case = Case(3, 2, 2, 16, torch.float32, "cpu")
    batch = case.build(*WORK["shared"])
    groups = plan.build(batch, case.cache, None).groups
    assert [(g.num_seqs, g.num_shared) for g in groups] == [(5, 16 * BLOCK), (1, 0)]
    windowed = plan.build(batch, case.cache, 20).groups
    assert [(g.num_seqs, g.num_shared) for g in windowed] == [(6, 0)]


def test_very_unequal_lengths_are_not_padded_together() -> None:
    case = Case(4, 2, 2, 16, torch.float32, "cpu")
    batch = case.build([(n, 1) for n in (600, 5, 590, 9, 3, 12)])
    groups = plan.build(batch, case.cache, None).groups
    assert [g.num_seqs for g in groups] == [2, 4]


def test_a_buffer_is_used_as_it_is_and_checked() -> None:
    shape = KVShape(num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32, block_size=2)
    buffer = memoryview(bytearray(3 * shape.block_bytes + 5))
    cache = PagedKVCache(shape, 3, "cpu", buffer)
    cache.pool[1] = 1.0
    assert bytes(buffer[: shape.block_bytes]) == bytes(shape.block_bytes)
    assert buffer[shape.block_bytes : 2 * shape.block_bytes].tobytes() == (
        torch.ones(shape.block_bytes // 4).numpy().tobytes()
    )
    cache.copy_blocks([1], [2])
    assert torch.equal(cache.pool[2], cache.pool[1])
    with pytest.raises(ValueError, match="4 blocks need"):
        PagedKVCache(shape, 4, "cpu", buffer)
