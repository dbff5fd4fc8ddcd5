"""An engine whose model is shared among ranks, from rank 0's side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.parallel.runner import ParallelCache, ParallelRunner
from pdbatch.engine.parallel.team import Team
from pdbatch.engine.parallel.transfers import ParallelTransfers
from pdbatch.engine.part import Part, build_part, engine_of
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.stepper import ModelSide


def build_parallel(config: EngineConfig, *, keep_prompts: bool = False) -> Engine:
    """Start the ranks, build a part on each, and the engine over them.

    Raises ModelError, ConfigError, EngineError.
    """
    threads = config.threads or os.cpu_count() or 1
    each = max(1, threads // config.tensor_parallel_size)
    config = dataclasses.replace(config, threads=each)
    team = Team(config)
    try:
        device = team.group.device
        part = build_part(dataclasses.replace(config, device=str(device)), group=team.group)
        team.release = part.release
        team.ready()
        return _engine(config, part, team, keep_prompts)
    except BaseException as error:
        raise team.ended_by(error) from error


def _engine(config: EngineConfig, part: Part, team: Team, keep_prompts: bool) -> Engine:
    cache = ParallelCache(part.cache, team)
    transfers: ParallelTransfers | None = None
    on_take: Callable[[Sequence[int]], None] | None = None
    if part.transfers is not None and part.on_take is not None:
        transfers = ParallelTransfers(part.transfers, team)
        on_take = cache.taken(part.on_take)
    side = ModelSide(
        runner=ParallelRunner(part.runner, team),
        sampler=Sampler(part.loaded.vocab_size, part.loaded.device),
        cache=cache,
        tokenizer=part.loaded.tokenizer,
        eos_token_ids=part.loaded.eos_token_ids,
    )
    return engine_of(
        config, part, side, transfers, on_take=on_take, keep_prompts=keep_prompts, ranks=team
    )
