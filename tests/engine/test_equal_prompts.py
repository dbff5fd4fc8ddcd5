"""Stretches of prompts of one length, and their attention as a batch."""

from __future__ import annotations

import pytest
import torch

from pdbatch.engine.attention.equal import EqualPrompts, serves


def test_a_shape_that_keeps_coming_back_is_taken_as_a_batch() -> None:
    equal = EqualPrompts()
    lens = [1024] * 13 + [300, 300, 700]
    for _ in range(3):
        assert equal.cut(lens) == [(16, False)]
    assert equal.cut(lens) == [(8, True), (4, True), (4, False)]


def test_short_prompts_and_lonely_ones_are_none() -> None:
    equal = EqualPrompts()
    for _ in range(5):
        found = equal.cut([64] * 8 + [512, 512, 512, 513] + [700] * 4)
    assert found == [(12, False), (4, True)]


def test_every_prompt_is_in_one_piece() -> None:
    equal = EqualPrompts()
    for seed in range(50):
        lens = torch.randint(255, 258, (seed,), generator=torch.Generator().manual_seed(seed))
        pieces = equal.cut(lens.tolist())
        assert sum(count for count, _batch in pieces) == seed
        assert all(count for count, _batch in pieces)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size"), [((32, 8), 128), ((9, 3), 64)])
def test_cudnn_gives_what_the_book_gives(heads: tuple[int, int], size: int) -> None:
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not serves(device, size, torch.bfloat16):
        pytest.skip("it needs a Hopper GPU")
    generator = torch.Generator(device).manual_seed(3)
    width = heads[0] + 2 * heads[1]
    qkv = torch.randn(4 * 300, width, size, device=device, generator=generator).bfloat16()
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], 1)
    got = EqualPrompts().attend(q, k, v, 300, 0.1)
    assert got is not None and got.shape == q.shape
    many = heads[0] // heads[1]
    q, k, v = (x.double().unflatten(0, (4, 300)).transpose(1, 2) for x in (q, k, v))
    scores = 0.1 * q @ k.repeat_interleave(many, 1).mT
    unseen = torch.ones(300, 300, device=device).triu(1).bool()
    want = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ v.repeat_interleave(many, 1)
    want = want.transpose(1, 2).flatten(0, 1)
    assert float((got - want).norm() / want.norm()) < 1e-2
