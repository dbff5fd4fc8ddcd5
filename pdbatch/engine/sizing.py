"""How large steps and the pool become: what the configuration says, and what a GPU's memory allows.

On a GPU that runs Triton, and where the pool's size is not set:

    1. The largest step runs over a cache of one block; how much memory it took is noted (`peak`).
    2. If that is more than a quarter of what the weights leave, and the size of a step is not set,
       steps are halved, tokens first, then sequences; back to 1.
    3. What is left is the pool.

Elsewhere on a GPU a step's need is guessed, and on the CPU the pool has a fixed size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pdbatch.engine import config as settings
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.kvcache import KVShape
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.memory import Room
from pdbatch.errors import ConfigError

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 1 << 30
_GUESSED_STEP = 0.05
"""Of a GPU's memory, where a step cannot be measured."""
_MOST_OF_STEP = 0.25
"""Share of what the weights leave that a step may need before steps are made smaller."""
_FEW_TOKENS, _FEWEST_SEQS = 2048, 32
"""Tokens are halved down to the first, then sequences and tokens while they are above these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a step and a sequence may be."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    def smaller(self, config: EngineConfig) -> Sizes | None:
        """The next smaller steps, of what the configuration leaves open; None: there are none."""
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if config.max_num_batched_tokens is None and tokens > _FEW_TOKENS:
            return replace(self, max_num_batched_tokens=max(_FEW_TOKENS, tokens // 2))
        if config.max_num_seqs is None and seqs > _FEWEST_SEQS:
            return replace(self, max_num_seqs=max(_FEWEST_SEQS, seqs // 2))
        return None


def asked(config: EngineConfig, loaded: LoadedModel) -> Sizes:
    """What the configuration says, and its defaults for the model's device."""
    kind = loaded.device.type
    return Sizes(
        max_num_seqs=config.max_num_seqs or settings.most_seqs(kind),
        max_num_batched_tokens=config.max_num_batched_tokens or settings.most_batched_tokens(kind),
        max_model_len=min(config.max_model_len or loaded.max_model_len, loaded.max_model_len),
    )


def fit(
    config: EngineConfig,
    sizes: Sizes,
    room: Room,
    peak: Callable[[Sizes], int | None],
    agree: Callable[[int], int],
) -> tuple[Sizes, int]:
    """Steps that fit on a GPU, and the bytes that the largest needs.

    `peak` runs one and says what it took; None: there was not enough. `agree` makes the smallest
    number of all ranks of one. Raises ConfigError if no step fits.
    """
    while True:
        need = peak(sizes)
        fits = need is not None and need <= _MOST_OF_STEP * room.left(0)
        smaller = sizes.smaller(config)
        if agree(int(fits)) or (smaller is None and need is not None):
            assert need is not None
            return sizes, need
        if smaller is None:
            raise ConfigError(
                f"a step of {sizes.max_num_batched_tokens} tokens and {sizes.max_num_seqs} "
                f"sequences does not fit beside the model's weights: {room}",
                remedy="lower max_num_batched_tokens or max_num_seqs, or use a larger GPU",
            )
        sizes = smaller


def num_blocks(
    config: EngineConfig,
    loaded: LoadedModel,
    shape: KVShape,
    peak: Callable[[Sizes], int | None] | None,
    group: Group | None = None,
) -> tuple[Sizes, int]:
    """Sizes of steps, and the blocks of the pool. Without `peak` no step is measured.

    Raises ConfigError if there is no room for a single block.
    """
    sizes = asked(config, loaded)
    count = config.num_blocks
    if count is None and config.kv_cache_bytes is not None:
        count = _count(config.kv_cache_bytes, shape, f"kv_cache_bytes is {config.kv_cache_bytes}")
    elif count is None and loaded.device.type == "cuda":
        sizes, count = _on_gpu(config, loaded, shape, peak, group)
    elif count is None:
        count = _count(_CPU_CACHE_BYTES, shape, "the pool has 1 GiB; set kv_cache_bytes")
    if config.num_blocks is None:  # no more than can ever be of use
        count = min(count, 2 * sizes.max_num_seqs * -(-sizes.max_model_len // shape.block_size))
    return sizes, count if group is None else group.least(count)


def _on_gpu(
    config: EngineConfig,
    loaded: LoadedModel,
    shape: KVShape,
    peak: Callable[[Sizes], int | None] | None,
    group: Group | None,
) -> tuple[Sizes, int]:
    sizes = asked(config, loaded)
    room = Room.of(loaded.device, config.gpu_memory_utilization)
    need = int(room.total_bytes * _GUESSED_STEP)
    if peak is not None:
        try:
            sizes, need = fit(config, sizes, room, peak, group.least if group is not None else int)
        except RuntimeError as error:
            if group is not None:
                raise
            logger.warning("the largest step fails, so that its need is guessed: %s", error)
            peak = None
    room = Room.of(loaded.device, config.gpu_memory_utilization)
    size = room.left(need)
    told = f"{room}, the largest step {need / 2**30:.2f}"
    logger.info(
        "%s GiB (%d tokens, %d sequences%s), for the cache %.2f: %d tokens",
        told,
        sizes.max_num_batched_tokens,
        sizes.max_num_seqs,
        "" if peak is not None else ", guessed",
        size / 2**30,
        max(0, size) // shape.block_bytes * shape.block_size,
    )
    return sizes, _count(size, shape, told)


def _count(size: int, shape: KVShape, told: str) -> int:
    count = size // shape.block_bytes
    if count < 1:
        raise ConfigError(
            f"no room for a block of {shape.block_bytes} bytes of KV cache ({told})",
            remedy="raise kv_cache_bytes or gpu_memory_utilization, lower max_num_batched_tokens "
            "or max_num_seqs, or share the model among GPUs with tensor_parallel_size",
        )
    return int(count)
