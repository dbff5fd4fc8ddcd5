"""Kernels between products against plain torch, and a merged model through all of them."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, VOCAB, Loop, loaded, make
from triton_machine import DEVICE, GPU, marks

from pdbatch.engine import merged
from pdbatch.engine.attention import decodes, prepare
from pdbatch.engine.attention.triton_step import TritonStep
from pdbatch.engine.attention.upload import Upload
from pdbatch.engine.kernels import activation, norm, rotary
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.merged.norm import normed

pytestmark = marks
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(ROUNDING) if GPU else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 576, 4096])
@pytest.mark.parametrize("style", [0, 1, 2])
def test_norms(style: int, size: int, dtype) -> None:
    torch.manual_seed(size)
    x, old = (torch.randn(1, 5, size, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(size, device=DEVICE).to(dtype)
    want = normed(x, weight, 1e-6, style)
    close = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
    torch.testing.assert_close(norm.norm(x, weight, 1e-6, style), want, **close)
    added = norm.norm(x, weight, 1e-6, style, old)
    assert added is old
    torch.manual_seed(size)
    _x, old = (torch.randn(1, 5, size, device=DEVICE).to(dtype) for _ in range(2))
    close["atol"] *= 8  # sums that cancel
    torch.testing.assert_close(added, old + want, **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations(dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 2 * 1500, device=DEVICE).to(dtype) * 3
    gate, up = x.chunk(2, -1)
    close = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
    want = {
        "silu": F.silu(gate) * up,
        "gelu_pytorch_tanh": F.gelu(gate, approximate="tanh") * up,
        "gelu": F.gelu(gate) * up,
    }
    for kind in activation.KINDS:
        torch.testing.assert_close(activation.gated(x, kind), want[kind], **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed_heads", [None, 0, 2])
@pytest.mark.parametrize(("size", "turning"), [(64, 64), (80, 80), (96, 72), (128, 128)])
@pytest.mark.parametrize("pairs", [False, True])
def test_turning_and_writing(pairs: bool, size: int, turning: int, normed_heads, dtype) -> None:
    torch.manual_seed(size)
    heads, q_heads, count, block = 2, 6, 11, 8
    shape = KVShape(num_layers=2, num_kv_heads=heads, head_dim=size, dtype=dtype, block_size=block)
    cache = PagedKVCache(shape, 6, DEVICE)
    slots = torch.tensor([8, 9, -1, 40, 3, 47, 0, 16, 17, -1, 31], dtype=torch.int32)
    qkv = torch.randn(count, (q_heads + 2 * heads) * size, device=DEVICE).to(dtype)
    angles = torch.rand(count, turning // 2, device=DEVICE) * 6
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angles.cos(), angles.sin()))
    weights = [torch.randn(size, device=DEVICE).to(dtype) for _ in range(2)]
    x = qkv.view(count, -1, size).clone()
    if normed_heads is not None:
        for at, weight in ((slice(0, q_heads), 0), (slice(q_heads, q_heads + heads), 1)):
            x[:, at] = normed(x[:, at], weights[weight], 1e-6, normed_heads)
    half = turning // 2
    a, b = slice(0, half), slice(half, turning)
    if pairs:
        a, b = slice(0, turning, 2), slice(1, turning, 2)
    want = x.clone().float()
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    want[..., a] = x[..., a].float() * c - x[..., b].float() * s
    want[..., b] = x[..., b].float() * c + x[..., a].float() * s
    want[:, -heads:] = x[:, -heads:].float()
    how = rotary.Turning(
        num_q_heads=q_heads,
        num_turning=turning,
        pairs=pairs,
        q_norm=None if normed_heads is None else weights[0],
        k_norm=None if normed_heads is None else weights[1],
        eps=1e-6,
        shifted=normed_heads == 2,
    )
    close = {"rtol": ROUNDING[dtype], "atol": 2 * ROUNDING[dtype]}
    before = qkv.clone()
    for keep_k in (False, True):
        qkv.copy_(before)
        rotary.rotary(qkv, cos, sin, how, cache, 1, slots.to(DEVICE), keep_k=keep_k)
        got = qkv.view(count, -1, size).float()
        kept = q_heads + heads if keep_k else q_heads
        torch.testing.assert_close(got[:, :kept], want[:, :kept], **close)
        if not keep_k:
            assert torch.equal(qkv[:, kept * size :], before[:, kept * size :])
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                found = cache.pool[slot // block, 1, :, :, slot % block].float()
                torch.testing.assert_close(found[0], want[token, q_heads:-heads], **close)
                torch.testing.assert_close(found[1], want[token, -heads:], **close)
    assert cache.pool[:, 0].count_nonzero() == 0


class _KernelRunner:
    """Runs a merged model's steps through the kernels, as the GPU's runner does."""

    def __init__(self, loop: Loop, model, num_q_heads: int) -> None:
        self._cache = loop.cache
        self._model = model
        self._upload = Upload(torch.device(DEVICE))
        self._sizes = decodes.Sizes(
            num_q_heads=num_q_heads, shape=loop.cache.shape, processors=8, windowed=True
        )

    @torch.inference_mode()
    def execute(self, batch):
        step = prepare.eager(batch, self._sizes, self._upload)
        last = [batch.cu_seqlens_q[seq + 1] - 1 for seq in batch.logits_indices]
        return self._model(
            input_ids=step.input_ids_T.unsqueeze(0),
            position_ids=step.positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor(last, device=DEVICE),
            pdbatch_step=TritonStep(self._cache, step.tables),
        ).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_through_the_kernels(family: str, monkeypatch) -> None:
    """Logits of prefill, chunks and decodes, against the unmerged model and plain attention."""
    model = make(family)
    other = copy.deepcopy(model)
    plain, engine = loaded(model, DEVICE), loaded(other, DEVICE)
    if not GPU:  # the kernels, interpreted, where a GPU would run them
        _on_this_machine(monkeypatch)
    assert merged.merge(other) == 3
    one, two = Loop(plain), Loop(dataclasses.replace(engine))
    two.runner = _KernelRunner(two, other, 4)
    rng = random.Random(len(family))
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (5, 41, 1, 30)]
    steps = [
        [(0, prompts[0]), (1, prompts[1][:20])],
        [(0, [7]), (1, prompts[1][20:]), (2, prompts[2]), (3, prompts[3])],
        [(seq, [9]) for seq in range(4)],
    ]
    for work in steps:
        wanted = [seq for seq, _ in work]
        a = one.step([(seq, list(ids)) for seq, ids in work], wanted)
        b = two.step([(seq, list(ids)) for seq, ids in work], wanted)
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-4)


def _on_this_machine(monkeypatch) -> None:
    """Let merged layers take their GPU path on CPU tensors."""
    from pdbatch.engine.merged import attention, build, feedforward
    from pdbatch.engine.merged import norm as norms

    def forward(self, x, residual=None):
        return norm.norm(x, self.weight, self.eps, self.style, residual)

    def inner(self, x):
        return activation.gated(F.linear(x, self.weight, self.bias), self.kind)

    class Kernels(attention.MergedAttention):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self._turning = self._kernel_turning()

    monkeypatch.setattr(norms.Norm, "forward", forward)
    monkeypatch.setattr(feedforward.MergedMLP, "inner", inner)
    monkeypatch.setattr(build, "MergedAttention", Kernels)
