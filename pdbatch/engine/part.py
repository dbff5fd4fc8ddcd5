"""What one rank of an engine runs: model, cache, hand-off, sizes; and the engine over it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pdbatch.engine import fences, loader, pool, runner, sizing
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockPool
from pdbatch.engine.caches import keep_compiled
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.handoff import KVLayout, KVTransfers, make_region
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.memory import is_shortage
from pdbatch.engine.messages import EngineInfo
from pdbatch.engine.pool import RegionMaker
from pdbatch.engine.ports import Ranks, Runner, Transfers
from pdbatch.engine.sizing import Sizes
from pdbatch.engine.stepper import ModelSide
from pdbatch.errors import ConfigError

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank runs; where there are no others, all of it."""

    loaded: LoadedModel
    cache: PagedKVCache
    runner: Runner
    transfers: KVTransfers | None
    on_take: Callable[[Sequence[int]], None] | None
    """Hears of blocks that get other content."""
    layout: KVLayout
    sizes: Sizes
    release: Callable[[], None]
    """Lets go of what the runner keeps on the device besides the model; it runs no step after."""


def build_part(
    config: EngineConfig,
    loaded: LoadedModel | None = None,
    *,
    group: Group | None = None,
    ways: Sequence[Any] | None = None,
    region: RegionMaker = make_region,
) -> Part:
    """Everything that touches the device, loaded, sized and warmed up, in this order: weights, the
    largest step measured (`sizing`), the pool, the rehearsal of all steps.

    The ranks of a group call this at the same time: the model's parts talk meanwhile, and all pools
    get as many blocks as the smallest can have.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if loaded is None:
        loaded = _loaded(config, group)
    elif config.quantization not in (None, loaded.quantization):
        raise ConfigError(
            "a model that is in memory already stays as it is: it cannot be quantized",
            remedy="name its folder, or give `quantization` to the loader",
        )
    if loaded.device.type == "cuda":
        if loaded.device.index is not None:
            torch.cuda.set_device(loaded.device)
        keep_compiled(config.home)
    runner.prepare_model(loaded)
    shape = runner.kv_shape(loaded, config.block_size)
    sizes, num_blocks = sizing.num_blocks(config, loaded, shape, _peak(loaded, shape), group)
    layout = kv_layout(loaded, shape)
    memory = pool.memory(config, shape, num_blocks, loaded.device, group, region)
    cache, transfers, on_take = pool.over(memory, config, shape, loaded.device, layout, ways)
    model_runner = runner.make_runner(
        loaded,
        cache,
        config,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
    )
    model_runner.warmup()
    logger.info(
        "%s on %s: %d blocks of %d bytes",
        loaded.name,
        loaded.device,
        cache.num_blocks,
        shape.block_bytes,
    )
    return Part(
        loaded=loaded,
        cache=cache,
        runner=model_runner,
        transfers=transfers,
        on_take=on_take,
        layout=layout,
        sizes=sizes,
        release=model_runner.close,
    )


def engine_of(
    config: EngineConfig,
    part: Part,
    side: ModelSide,
    transfers: Transfers | None,
    *,
    on_take: Callable[[Sequence[int]], None] | None,
    keep_prompts: bool,
    ranks: Ranks | None = None,
) -> Engine:
    """The engine over a part and its neighbours, which may stand for those of other ranks too."""
    kind, num_blocks = part.loaded.device.type, part.cache.num_blocks
    blocks = BlockManager(
        BlockPool(num_blocks, on_take),
        config.block_size,
        prefix_caching=config.enable_prefix_caching,
        root=bytes.fromhex(part.layout.fingerprint),
    )
    return Engine(
        side,
        blocks,
        transfers,
        info=_info(config, part),
        role=config.role,
        worker=config.worker,
        max_num_seqs=part.sizes.max_num_seqs,
        max_num_batched_tokens=part.sizes.max_num_batched_tokens,
        pinned_share=config.pinned_share,
        preempt_every_steps=config.preempt_every_steps,
        keep_prompts=keep_prompts,
        run_ahead=kind == "cuda" if config.run_ahead is None else config.run_ahead,
        mark=fences.marker(str(part.loaded.device)),
        ranks=ranks,
    )


def kv_layout(loaded: LoadedModel, shape: KVShape) -> KVLayout:
    """How KV lies here: what both ends of a hand-off must have in common, and whose heads."""
    shard = loaded.shard
    return KVLayout(
        model=_weights_name(loaded),
        dtype=_name(loaded.dtype),
        itemsize=shape.dtype.itemsize,
        block_size=shape.block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads if shard is None else shard.num_kv_heads,
        head_dim=shape.head_dim,
        order="head_major",
        tp_size=1 if shard is None else shard.group.size,
        tp_rank=0 if shard is None else shard.group.rank,
    )


def _weights_name(loaded: LoadedModel) -> str:
    """The model's name and what its weights were rounded to: other weights make other KV."""
    return loaded.name if loaded.quantization is None else f"{loaded.name} {loaded.quantization}"


def _loaded(config: EngineConfig, group: Group | None) -> LoadedModel:
    """Raises ModelError, and ConfigError where the weights find no room."""
    try:
        return loader.load(
            config.model, config.home, config.device, config.dtype, group, config.quantization
        )
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        reason = str(error).splitlines()[0]
    raise ConfigError(
        f"the weights of {config.model} do not fit: {reason}",
        remedy="use a larger or an emptier GPU, fewer bits (quantization), or share "
        "the model with tensor_parallel_size",
    )


def _peak(loaded: LoadedModel, shape: KVShape) -> Callable[[Sizes], int | None] | None:
    """How the memory of a step is measured; None where it cannot be."""
    if not runner.runs_triton(loaded.device):
        return None
    from pdbatch.engine.peak import measured

    return partial(measured, loaded, shape)


def _info(config: EngineConfig, part: Part) -> EngineInfo:
    loaded, layout = part.loaded, part.layout
    return EngineInfo(
        model=loaded.name,
        role=config.role,
        device=str(loaded.device),
        dtype=_name(loaded.dtype),
        max_model_len=part.sizes.max_model_len,
        block_size=config.block_size,
        num_blocks=part.cache.num_blocks,
        block_bytes=layout.block_bytes * layout.tp_size,
        layout=layout.fingerprint,
        transports=part.transfers.transports if part.transfers is not None else [],
        pid=os.getpid(),
        gpu=_gpu(loaded.device),
        listen_host=config.listen_host,
    )


def _gpu(device: torch.device) -> str:
    """The UUID of a GPU, as nvidia-smi writes it; "" for the CPU."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    return f"GPU-{uuid}" if uuid else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
