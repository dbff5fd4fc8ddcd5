"""The memory of an engine's pool: allocated, smaller if need be, and the cache over it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.handoff import DeviceRegion, KVLayout, KVTransfers, Region
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.memory import is_shortage, release_unused
from pdbatch.errors import ConfigError

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group

logger = logging.getLogger(__name__)

Memory = TypeVar("Memory")
RegionMaker = Callable[[EngineConfig, int, int, str], Region]
"""(configuration, blocks, bytes of a block, device)"""


def memory(
    config: EngineConfig,
    shape: KVShape,
    num_blocks: int,
    device: torch.device,
    group: Group | None,
    make: RegionMaker,
) -> PagedKVCache | Region:
    """A region that peers can read where KV is handed over, else a cache of its own.

    Where there turns out to be less memory, a pool that was sized by the engine becomes smaller,
    the same on all ranks. Raises ConfigError.
    """

    def allocate(count: int) -> PagedKVCache | Region:
        if config.role == "mixed":
            return PagedKVCache(shape, count, device)
        return make(config, count, shape.block_bytes, str(device))

    may_shrink = config.num_blocks is None and config.kv_cache_bytes is None
    made, count = allocated(allocate, num_blocks, may_shrink=may_shrink)
    least = count if group is None else group.least(count)
    if least < count:
        del made
        made, _ = allocated(allocate, least, may_shrink=False)
    return made


def over(
    made: PagedKVCache | Region,
    config: EngineConfig,
    shape: KVShape,
    device: torch.device,
    layout: KVLayout,
    ways: Sequence[Any] | None,
) -> tuple[PagedKVCache, KVTransfers | None, Callable[[Sequence[int]], None] | None]:
    """The cache, its hand-off, and who hears of blocks that get other content."""
    if isinstance(made, PagedKVCache):
        return made, None, None
    buffer = made.tensor if isinstance(made, DeviceRegion) else made.buffer
    cache = PagedKVCache(shape, made.num_blocks, device, buffer)
    return cache, KVTransfers(made, layout, config, ways=ways), made.take


def allocated(
    allocate: Callable[[int], Memory], num_blocks: int, *, may_shrink: bool
) -> tuple[Memory, int]:
    """What `allocate` makes of so many blocks, or of fewer where memory is short; and how many.

    Raises ConfigError if there is no room even for a tenth, or for all if it may not shrink.
    """
    count = num_blocks
    while True:
        try:
            return allocate(count), count
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or is_shortage(error)):
                raise
        release_unused()
        count = count * 9 // 10
        if not may_shrink or count < max(1, num_blocks // 10):
            raise ConfigError(
                f"there is no memory for a pool of {num_blocks} blocks",
                remedy="lower what sizes it (num_gpu_blocks, kv_cache_bytes or "
                "gpu_memory_utilization), or see what else uses the GPU",
            )
        logger.warning("no memory for a pool of %d blocks: %d are tried", num_blocks, count)
