"""Weights of 8 and 4 bits: their rounding, their layout, and the kernels against float64."""

from __future__ import annotations

import pytest
import torch

from pdbatch.engine.quantization.cuts import MOST_ROWS, cut, piece
from pdbatch.engine.quantization.linear import MOST_TILES
from pdbatch.engine.quantization.packed import pack, unpack
from pdbatch.engine.quantization.rounding import Rounded, rounded

pytestmark = pytest.mark.parametrize("bits", [8, 4])


def _weight(outputs: int, inputs: int) -> torch.Tensor:
    torch.manual_seed(outputs + inputs)
    return torch.randn(outputs, inputs) * torch.rand(outputs, 1)


def test_no_weight_moves_further_than_half_a_step(bits: int) -> None:
    weight = _weight(40, 300)
    made = rounded(weight, bits).numbers(300)
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        parts = torch.nn.functional.pad(weight, (0, 84)).view(40, 3, 128)
        step = (parts.amax(2).clamp_min(0) - parts.amin(2).clamp_max(0)) / 15
        step = step.repeat_interleave(128, 1)[:, :300]
    most = 0.501 if bits == 8 else 0.56  # the scale is rounded too, and so is zero
    assert ((made - weight).abs() <= most * step).all()
    assert (made - weight).std() < weight.std() * (0.01 if bits == 8 else 0.12)


def test_what_the_grid_holds_stays_as_it_is(bits: int) -> None:
    torch.manual_seed(1)
    q = torch.randint(-127, 128, (8, 256)) if bits == 8 else torch.randint(0, 16, (8, 256)) - 5
    q[:, ::128], q[:, 1::128] = (127, -127) if bits == 8 else (10, -5)
    weight = q * 0.03125
    assert torch.equal(rounded(weight, bits).numbers(256), weight)


def test_weights_of_zero_stay_zero(bits: int) -> None:
    weight = _weight(6, 256)
    weight[2], weight[:, 128:] = 0, 0
    made = rounded(weight, bits).numbers(256)
    assert made[2].count_nonzero() == made[:, 128:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(40, 300), (2100, 128), (1, 7)])
def test_packing_loses_nothing(shape: tuple[int, int], bits: int) -> None:
    one = rounded(_weight(*shape), bits)
    two = unpack(*pack(one))
    assert isinstance(two, Rounded)
    assert torch.equal(one.q_NSK, two.q_NSK)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.numbers(shape[1]), two.numbers(shape[1]))


@pytest.mark.parametrize(
    "shape", [(6144, 4096), (28672, 4096), (128_256, 4096), (64, 7), (960, 576)]
)
def test_cuts_fit_their_products(shape: tuple[int, int], bits: int) -> None:
    outputs, inputs = shape
    slabs = -(-inputs // 128)
    for rows in range(1, MOST_ROWS + 1):
        tiles = cut(bits, rows, outputs, slabs)
        assert tiles.rows >= min(rows, 64) and 1 <= tiles.shares <= max(1, slabs)
        assert -(-outputs // tiles.outputs) * -(-rows // tiles.rows) <= MOST_TILES
    assert len({cut(bits, rows, outputs, slabs) for rows in range(1, 17)}) == 1
    assert 0 < piece(outputs, inputs) * inputs * 2 <= max(300e6, inputs * 2)
