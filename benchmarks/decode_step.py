"""A load like a decode step's, for measuring what goes on beside one."""

from __future__ import annotations

from typing import Any

LAYERS, HEADS, HEAD_DIM = 32, 8, 128


class DecodeStep:
    """What a step of 256 sequences of about 1,000 tokens costs such a model, as a CUDA graph."""

    def __init__(self, device: str, batch: int = 256, context: int = 1024) -> None:
        import torch

        self._torch, self._device = torch, device
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        shapes = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
        self._weights = [[torch.randn(*s, **kind) * 0.01 for s in shapes] for _ in range(3)]
        self._x = torch.randn(batch, 4096, **kind)
        rows = batch * HEADS
        self._k = torch.randn(rows, context, HEAD_DIM, **kind)
        self._v = torch.randn(rows, context, HEAD_DIM, **kind)
        self._batch = batch
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._step()
        self._stream = stream

    def _step(self) -> None:
        torch, x = self._torch, self._x
        for layer in range(LAYERS):
            qkv, o, up, down = self._weights[layer % 3]
            q = (x @ qkv)[:, :4096].reshape(self._batch * HEADS, 4, HEAD_DIM)
            scores = torch.softmax(torch.bmm(q, self._k.transpose(1, 2)), -1)
            x = torch.bmm(scores, self._v).reshape(self._batch, 4096) @ o
            both = x @ up
            x = (torch.nn.functional.silu(both[:, :14336]) * both[:, 14336:]) @ down

    def milliseconds(self, rounds: int) -> list[float]:
        """Of each step, one after another, as the device saw it."""
        torch, found = self._torch, []
        with torch.cuda.stream(self._stream):
            for _ in range(rounds):
                first = torch.cuda.Event(enable_timing=True)
                last = torch.cuda.Event(enable_timing=True)
                first.record()
                self._graph.replay()
                last.record()
                last.synchronize()
                found.append(first.elapsed_time(last))
        return found
