"""CUDA graphs of decode steps, for a ladder of batch sizes.

Graphs are captured before the first request (`rehearse`), the largest first: the others share its
memory, since no two run at a time. One that was not is captured when a batch of its size and
kind first comes: that step runs operation by operation, which also compiles what it needs, and is
then captured for those that follow, until a capture finds no memory. A batch between two rungs is
padded to the upper one: padded rows write nowhere and have no keys.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from pdbatch.engine import rehearsal
from pdbatch.engine.attention import decodes, prepare
from pdbatch.engine.memory import is_shortage
from pdbatch.engine.model_input import ModelInput

logger = logging.getLogger(__name__)

Run = Callable[[prepare.Step], torch.Tensor]
"""The body: a step's hidden states [T, C]."""


def ladder(most: int) -> list[int]:
    """Batch sizes up to `most`, finer where a row more costs more."""
    rungs = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    rungs += range(512, most + 1, 64)
    return [rung for rung in rungs if rung < most] + [most]


class DecodeGraphs:
    """Runs decode steps of up to `most` rows through graphs."""

    def __init__(
        self, run: Run, captured: prepare.Captured, sizes: decodes.Sizes, most: int
    ) -> None:
        self._run = run
        self._captured = captured
        self._sizes = sizes
        self._ladder = ladder(most)
        self._graphs: dict[tuple[int, decodes.Kind], torch.cuda.CUDAGraph] = {}
        self._hidden_RC: torch.Tensor | None = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._broken = False
        self._full = False
        """No memory was left for another graph."""

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def run(self, batch: ModelInput) -> torch.Tensor | None:
        """Hidden states, [rows, C] with at least the batch's rows first; None: run it eagerly.

        They stay until the next call.
        """
        if self._broken or batch.num_decodes > self._ladder[-1]:
            return None
        rows = self._ladder[bisect_left(self._ladder, batch.num_decodes)]
        plan = decodes.plan(batch, self._sizes, rows)
        self._captured.fill(batch, plan, rows)
        graph = self._graphs.get((rows, plan.kind))
        if graph is None:
            step = self._captured.step(batch, plan, rows)
            hidden_RC = self._run(step)
            if self._full:
                return hidden_RC
            self._capture(step, rows, plan.kind, hidden_RC)
            return hidden_RC
        graph.replay()
        return self._hidden_RC

    def rehearse(self, most_keys: int) -> None:
        """Capture every rung, for sequences of up to `most_keys` tokens."""
        for rows in reversed(self._ladder):
            for batch in rehearsal.decoding(rows, self._sizes, most_keys):
                self.run(batch)

    def _capture(
        self, step: prepare.Step, rows: int, kind: decodes.Kind, hidden_RC: torch.Tensor
    ) -> None:
        if self._hidden_RC is None:
            self._hidden_RC = hidden_RC.new_empty(self._ladder[-1], hidden_RC.shape[1])
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(hidden_RC.device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            # A stream of ours: torch's own for captures stays on the device that came first.
            # Pulls go on in their threads: what they ask of CUDA is no matter of this capture.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._hidden_RC[:rows].copy_(self._run(step))
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if is_shortage(error) or is_shortage(error.__context__):
                self._full = True
                logger.warning("no memory for more than %d graphs of decodes", self.count)
                return
            self._broken = True
            reason = str(error).splitlines()[0]
            logger.warning("decodes run without CUDA graphs, which this model refuses: %s", reason)
            return
        self._graphs[rows, kind] = graph
