"""From a configuration to a running engine: model, cache, blocks, hand-off, sizes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pdbatch.engine import fences, loader, runner
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockPool
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.handoff import DeviceRegion, KVLayout, KVTransfers, Region, make_region
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.messages import EngineInfo
from pdbatch.engine.ports import Ranks, Runner, Transfers
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.stepper import ModelSide
from pdbatch.errors import ConfigError

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group

logger = logging.getLogger(__name__)

RegionMaker = Callable[[EngineConfig, int, int, str], Region]
"""(configuration, blocks, bytes of a block, device)"""

_CPU_CACHE_BYTES = 1 << 30
_LEFT_FREE = 0.05
"""Share of a GPU that stays free beside what other processes took, for a step's own needs."""
_MOST_SEQS = {"cuda": 256, "cpu": 64}
_MOST_BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}


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
    max_num_seqs: int
    max_model_len: int
    release: Callable[[], None]
    """Lets go of what the runner keeps on the device besides the model; it runs no step after."""


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


def build_part(
    config: EngineConfig,
    loaded: LoadedModel | None = None,
    *,
    group: Group | None = None,
    ways: Sequence[Any] | None = None,
    region: RegionMaker = make_region,
) -> Part:
    """Everything that touches the device, loaded, sized and warmed up.

    The ranks of a group call this at the same time: the model's parts talk meanwhile, and all pools
    get as many blocks as the smallest can have.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if loaded is None:
        loaded = loader.load(
            config.model, config.home, config.device, config.dtype, group, config.quantization
        )
    kind = loaded.device.type
    if kind == "cuda" and loaded.device.index is not None:
        torch.cuda.set_device(loaded.device)
    max_num_seqs = config.max_num_seqs or _MOST_SEQS.get(kind, 64)
    max_model_len = min(config.max_model_len or loaded.max_model_len, loaded.max_model_len)
    runner.prepare_model(loaded)
    shape = runner.kv_shape(loaded, config.block_size)
    useful = 2 * max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks or min(_num_blocks(config, loaded, shape), useful)
    if group is not None:
        num_blocks = group.least(num_blocks)
    layout = kv_layout(loaded, shape)
    cache, transfers, on_take = _memory(config, loaded, shape, num_blocks, ways, region)
    model_runner = runner.make_runner(
        loaded, cache, config, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    model_runner.warmup()
    logger.info(
        "%s on %s: %d blocks of %d bytes", loaded.name, loaded.device, num_blocks, shape.block_bytes
    )
    return Part(
        loaded=loaded,
        cache=cache,
        runner=model_runner,
        transfers=transfers,
        on_take=on_take,
        layout=layout,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
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
        max_num_seqs=part.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens
        or _MOST_BATCHED_TOKENS.get(kind, 2048),
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


def _memory(
    config: EngineConfig,
    loaded: LoadedModel,
    shape: KVShape,
    num_blocks: int,
    ways: Sequence[Any] | None,
    make: RegionMaker,
) -> tuple[PagedKVCache, KVTransfers | None, Callable[[Sequence[int]], None] | None]:
    """The cache, its hand-off, and who hears of blocks that get other content.

    Where KV is handed over, the cache lies in a region that peers can read.
    """
    if config.role == "mixed":
        return PagedKVCache(shape, num_blocks, loaded.device), None, None
    region = make(config, num_blocks, shape.block_bytes, str(loaded.device))
    memory = region.tensor if isinstance(region, DeviceRegion) else region.buffer
    cache = PagedKVCache(shape, num_blocks, loaded.device, memory)
    transfers = KVTransfers(region, kv_layout(loaded, shape), config, ways=ways)
    return cache, transfers, region.bump


def _num_blocks(config: EngineConfig, loaded: LoadedModel, shape: KVShape) -> int:
    """Blocks that the cache's bytes hold. Raises ConfigError if not even one."""
    size = config.kv_cache_bytes
    if size is None and loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        own = total * config.gpu_memory_utilization - torch.cuda.memory_reserved(loaded.device)
        size = int(min(own, free - total * _LEFT_FREE))
    elif size is None:
        size = _CPU_CACHE_BYTES
    count = size // shape.block_bytes
    if count < 1:
        raise ConfigError(
            f"{size} bytes hold no block of {shape.block_bytes} bytes",
            remedy="raise kv_cache_bytes or gpu_memory_utilization",
        )
    return count


def _info(config: EngineConfig, part: Part) -> EngineInfo:
    loaded, layout = part.loaded, part.layout
    return EngineInfo(
        model=loaded.name,
        role=config.role,
        device=str(loaded.device),
        dtype=_name(loaded.dtype),
        max_model_len=part.max_model_len,
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
