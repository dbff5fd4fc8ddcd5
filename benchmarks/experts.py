"""One layer's experts on a GPU, ours beside transformers' grouped product, by rows of each expert.

    python benchmarks/experts.py [--shape NAME] [--rows 1 8 32 …]

bfloat16, random weights, each token's experts drawn evenly, in a CUDA graph. The floor is the time
in which the weights of the experts that are met would be read at 3.0 TB/s, or their products done
at 700 TFLOP/s.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from pdbatch.engine import experts

SHAPES = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
    "ernie": (64, 6, 2560, 1536),
}
"""Experts, experts of each token, the model's width, an expert's inner width."""
_BYTES_S, _FLOP_S = 3.0e12, 700e12


def module(num: int, each: int, width: int, inner: int) -> Any:
    """Experts of random weights."""
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=num, num_experts_per_tok=each
    )
    with torch.device("cuda"):
        made: Any = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0.0, 0.02)
    experts.use(made)
    return made


def graph_us(made: Any, inputs: tuple[torch.Tensor, ...], few_rows: int) -> float:
    """Microseconds of one call, the least of some replays of ten."""
    kept, experts._FEW_ROWS = experts._FEW_ROWS, few_rows
    try:
        made(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                made(*inputs)
    finally:
        experts._FEW_ROWS = kept
    best = float("inf")
    for _ in range(5):
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        best = min(best, events[0].elapsed_time(events[1]) * 100)
    return best


@torch.inference_mode()
def table(name: str, rows: list[int]) -> None:
    """One line for each number of rows."""
    num, each, width, inner = SHAPES[name]
    made = module(num, each, width, inner)
    for rows_each in rows:
        count = max(1, rows_each * num // each)
        torch.manual_seed(rows_each)
        x = torch.randn(count, width, device="cuda").bfloat16()
        ids = torch.rand(count, num, device="cuda").topk(each).indices
        scores = torch.rand(count, each, device="cuda").bfloat16()
        theirs, ours = (graph_us(made, (x, ids, scores), few) for few in (0, 1 << 30))
        numbers = 3 * width * inner
        read_s = ids.unique().numel() * numbers * 2 / _BYTES_S
        floor = max(read_s, 2 * numbers * count * each / _FLOP_S) * 1e6
        print(
            f"{name:8s} {rows_each:4d} rows each ({count:5d} tokens): grouped {theirs:7.0f} us,"
            f" ours {ours:7.0f} us, floor {floor:6.0f} us",
            flush=True,
        )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 24, 32, 48, 64, 128])
    asked = parser.parse_args()
    for name in asked.shape:
        table(name, asked.rows)


if __name__ == "__main__":
    main()
