"""A layer's four narrow products with what stands before each, in a CUDA graph: microseconds.

    python benchmarks/narrow_chain.py

Beside each other: products that start when the kernel before them has ended, and such that ask for
their weights while it runs. Attention is left out: a norm stands in its place.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from narrow_products import SHAPES, graph_us

from pdbatch.engine.kernels import narrow
from pdbatch.engine.kernels.activation import gated
from pdbatch.engine.kernels.norm import norm
from pdbatch.engine.quantization.cuts import cut
from pdbatch.engine.quantization.linear import QuantizedLinear

_LAYERS = 8


class Layer:
    """Products and norms of one layer."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.weight_C = torch.ones(4096, device="cuda").bfloat16()
        self.linears = {
            name: QuantizedLinear(
                torch.randn(outputs, inputs, device="cuda").bfloat16() * 0.02, None, bits
            )
            for name, (outputs, inputs) in SHAPES.items()
        }

    def run(self, x_TC: torch.Tensor, ahead: bool) -> None:
        """x += o(norm(qkv(norm(x)))); x += down(gated(gate_up(norm(x))))."""
        qkv = self._product("qkv", norm(x_TC, self.weight_C, 1e-6, 0), ahead)
        heads = norm(qkv[:, :4096].contiguous(), self.weight_C, 1e-6, 0)
        self._product("o", heads, ahead, x_TC)
        both = self._product("gate_up", norm(x_TC, self.weight_C, 1e-6, 0), ahead)
        self._product("down", gated(both, "silu"), ahead, x_TC)

    def _product(
        self, name: str, x: torch.Tensor, ahead: bool, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        linear = self.linears[name]
        tiles = cut(self.bits, x.shape[0], linear.out_features, linear.q.shape[0])
        out = x.new_empty(x.shape[0], linear.out_features) if into is None else into
        narrow.product(
            x,
            linear.q,
            linear.scales,
            out,
            dataclasses.replace(tiles, ahead=ahead),
            linear.arrived,
            alpha=None if into is None else 1.0,
        )
        return out


def main() -> None:
    """Measure both widths at 1 and 16 rows."""
    for bits in (4, 8):
        layers = [Layer(bits) for _ in range(_LAYERS)]
        for rows in (1, 16):
            given = torch.randn(rows, 4096, device="cuda").bfloat16()
            found, results = [], []
            for ahead in (False, True):
                x = given.clone()
                for layer in layers:
                    layer.run(x, ahead)
                torch.cuda.synchronize()
                results.append(x.clone())
                calls = [functools.partial(layer.run, x, ahead) for layer in layers]
                found.append(graph_us(calls, 20))
            equal = torch.equal(*results)
            print(
                f"wint{bits} {rows:2d} rows: {found[0]:.1f} us a layer, ahead {found[1]:.1f};"
                f" {'equal' if equal else 'NOT EQUAL'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
