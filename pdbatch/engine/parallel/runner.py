"""Rank 0's runner and cache: what they do, all ranks do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.parallel.messages import CopyBlocks, Taken, step_of
from pdbatch.engine.parallel.team import Team
from pdbatch.engine.ports import Cache, Runner


class ParallelRunner:
    """A `Runner` over the parts of all ranks."""

    def __init__(self, runner: Runner, team: Team) -> None:
        self._runner = runner
        self._team = team

    def execute(self, batch: ModelInput) -> torch.Tensor:
        """As `runner.ModelRunner.execute`. Raises EngineError: after any failure, memory that ran
        out included, ranks may be at different places, and the engine ends."""
        self._team.check()
        self._team.tell(step_of(batch))
        try:
            if batch.tokens_before is not None:
                self._team.group.broadcast_(batch.tokens_before)
            logits: torch.Tensor = self._runner.execute(batch)
        except Exception as error:
            raise self._team.ended_by(error) from error
        return logits


class ParallelCache:
    """A `Cache` over the parts of all ranks."""

    def __init__(self, cache: Cache, team: Team) -> None:
        self._cache = cache
        self._team = team

    def copy_blocks(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """As `PagedKVCache.copy_blocks`."""
        self._team.tell(CopyBlocks(src=list(src), dst=list(dst)))
        self._cache.copy_blocks(src, dst)

    def taken(self, own: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
        """Called with blocks that get other content: every rank raises their generations."""

        def take(blocks: Sequence[int]) -> None:
            self._team.tell(Taken(blocks=list(blocks)))
            own(blocks)

        return take
