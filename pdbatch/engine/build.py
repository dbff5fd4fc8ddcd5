"""From a configuration to a running engine, on one device or shared among several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.handoff import make_region
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.part import build_part, engine_of
from pdbatch.engine.pool import RegionMaker
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.stepper import ModelSide
from pdbatch.errors import ConfigError


def build_engine(
    config: EngineConfig,
    loaded: LoadedModel | None = None,
    *,
    ways: Sequence[Any] | None = None,
    keep_prompts: bool = False,
    region: RegionMaker = make_region,
) -> Engine:
    """Load (unless `loaded`), size, wire up and warm up.

    `ways` replaces the configured transports of the hand-off; `keep_prompts` puts prompt token ids
    into results; `region` makes the memory of a pool that is handed over. The model's device
    becomes the calling thread's current one. Raises ModelError, ConfigError.
    """
    if config.tensor_parallel_size > 1:
        from pdbatch.engine.parallel.build import build_parallel

        if loaded is not None:
            raise ConfigError(
                "a model that is in memory already cannot be shared among ranks",
                remedy="name its folder",
            )
        return build_parallel(config, keep_prompts=keep_prompts)
    part = build_part(config, loaded, ways=ways, region=region)
    side = ModelSide(
        runner=part.runner,
        sampler=Sampler(part.loaded.vocab_size, part.loaded.device),
        cache=part.cache,
        tokenizer=part.loaded.tokenizer,
        eos_token_ids=part.loaded.eos_token_ids,
    )
    return engine_of(
        config, part, side, part.transfers, on_take=part.on_take, keep_prompts=keep_prompts
    )
