"""From a configuration to a running engine: model, cache, blocks, hand-off, sizes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

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
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.stepper import ModelSide
from pdbatch.errors import ConfigError

logger = logging.getLogger(__name__)

RegionMaker = Callable[[EngineConfig, int, int, str], Region]
"""(configuration, blocks, bytes of a block, device)"""

_CPU_CACHE_BYTES = 1 << 30
_LEFT_FREE = 0.05
"""Share of a GPU that stays free beside what other processes took, for a step's own needs."""
_MOST_SEQS = {"cuda": 256, "cpu": 64}
_MOST_BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}


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
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if loaded is None:
        loaded = loader.load(config.model, config.home, config.device, config.dtype)
    kind = loaded.device.type
    if kind == "cuda" and loaded.device.index is not None:
        torch.cuda.set_device(loaded.device)
    max_num_seqs = config.max_num_seqs or _MOST_SEQS.get(kind, 64)
    max_model_len = min(config.max_model_len or loaded.max_model_len, loaded.max_model_len)
    runner.prepare_model(loaded)
    shape = runner.kv_shape(loaded, config.block_size)
    useful = 2 * max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks or min(_num_blocks(config, loaded, shape), useful)
    layout = kv_layout(loaded, shape)
    cache, transfers, on_take = _memory(config, loaded, shape, num_blocks, ways, region)
    pool = BlockPool(num_blocks, on_take)
    blocks = BlockManager(
        pool,
        config.block_size,
        prefix_caching=config.enable_prefix_caching,
        root=bytes.fromhex(layout.fingerprint),
    )
    model_runner = runner.make_runner(
        loaded, cache, config, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    model_runner.warmup()
    logger.info(
        "%s on %s: %d blocks of %d bytes", loaded.name, loaded.device, num_blocks, shape.block_bytes
    )
    return Engine(
        ModelSide(
            runner=model_runner,
            sampler=Sampler(loaded.vocab_size, loaded.device),
            cache=cache,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
        ),
        blocks,
        transfers,
        info=_info(config, loaded, layout, num_blocks, max_model_len, transfers),
        role=config.role,
        worker=config.worker,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens
        or _MOST_BATCHED_TOKENS.get(kind, 2048),
        pinned_share=config.pinned_share,
        preempt_every_steps=config.preempt_every_steps,
        keep_prompts=keep_prompts,
        run_ahead=kind == "cuda" if config.run_ahead is None else config.run_ahead,
        mark=fences.marker(str(loaded.device)),
    )


def kv_layout(loaded: LoadedModel, shape: KVShape) -> KVLayout:
    """What both ends of a hand-off must have in common."""
    return KVLayout(
        model=loaded.name,
        dtype=_name(loaded.dtype),
        itemsize=shape.dtype.itemsize,
        block_size=shape.block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        order="head_major",
    )


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


def _info(
    config: EngineConfig,
    loaded: LoadedModel,
    layout: KVLayout,
    num_blocks: int,
    max_model_len: int,
    transfers: KVTransfers | None,
) -> EngineInfo:
    return EngineInfo(
        model=loaded.name,
        role=config.role,
        device=str(loaded.device),
        dtype=_name(loaded.dtype),
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        block_bytes=layout.block_bytes,
        layout=layout.fingerprint,
        transports=transfers.transports if transfers is not None else [],
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
