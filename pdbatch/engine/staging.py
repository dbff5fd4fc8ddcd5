"""The hand-off of an engine whose KV pool peers cannot read: through a staging area of the host.

The region that `KVTransfers` serves and pulls into is host memory of its own number of blocks; the
pool is on a device. Who owns a staging block, as half-open intervals:

    [pin, unpin)                     the producer: a copy of one block of the pool; peers read it
    [start_pull, finished_pulls)     the pull: one of its threads writes it, then it is copied
                                     into the pool on the engine's thread

The order that the proofs rest on: generations rise when blocks are taken, then the content
changes, and only when the copy from the device is complete is a descriptor made. A pull is
proved in the staging area, before its KV reaches the pool.

`has_room` tells whether enough blocks are free; who asks first (`Outgoing`, `Adoptions`) waits
with what it has until it is so. A hand-off never needs more than the area's size: `staging_blocks`
gives at least one sequence.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.handoff import KVTransfers, Region, runs
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.messages import Adoption, Handoff
from pdbatch.engine.payload import HandoffPayload
from pdbatch.engine.ports import Incoming, PullResult
from pdbatch.errors import InvariantError

logger = logging.getLogger(__name__)

_MOST_BYTES = 4 << 30
_SHARE_OF_HOST = 8
"""By default an engine takes at most this fraction of the host's memory."""


def staging_blocks(config: EngineConfig, num_blocks: int, block_bytes: int, most_len: int) -> int:
    """Blocks of the staging area for a pool of `num_blocks`; one sequence fits in any case.

    `most_len` is the longest sequence, in tokens.
    """
    size = config.kv_staging_bytes
    if size is None:
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size = min(_MOST_BYTES, host_bytes // _SHARE_OF_HOST)
    one_sequence = -(-most_len // config.block_size)
    return min(num_blocks, max(size // block_bytes, one_sequence))


class StagedTransfers:
    """`pdbatch.engine.ports.Transfers` for `pool`, by way of `region`, which `inner` works with."""

    def __init__(self, inner: KVTransfers, region: Region, pool: PagedKVCache) -> None:
        self._inner = inner
        self._region = region
        self._pool_NX = pool.pool.flatten(1)
        self._stage_SX = PagedKVCache(
            pool.shape, region.num_blocks, "cpu", region.buffer
        ).pool.flatten(1)
        self._free = list(reversed(range(region.num_blocks)))
        self._pinned: dict[str, list[int]] = {}
        self._pulling: dict[str, tuple[list[int], list[int]]] = {}
        """By hand-off: staging blocks, and the blocks of the pool that get their content."""
        self._locked = pool.device.type == "cuda" and _lock_pages(region, pool.device)

    @property
    def num_free(self) -> int:
        """Staging blocks that nobody holds."""
        return len(self._free)

    # --- producer's end

    def pin(
        self,
        handoff_id: str,
        blocks: Sequence[int],
        prompt: list[int],
        payload: HandoffPayload,
    ) -> Handoff:
        """Copy these blocks and offer the copy until `unpin`. Ask `has_room` first."""
        staged = self._take(len(blocks))
        self._pinned[handoff_id] = staged
        self._to_host(blocks, staged)
        return self._inner.pin(handoff_id, staged, prompt, payload)

    def unpin(self, handoff_id: str) -> None:
        """Stop offering."""
        self._inner.unpin(handoff_id)
        self._release(self._pinned.pop(handoff_id, []))

    # --- consumer's end

    def read(self, adoption: Adoption) -> Incoming:
        """Decode and prove a descriptor. Raises PullRefused."""
        return self._inner.read(adoption)

    def start_pull(self, incoming: Incoming, blocks: Sequence[int], skip: int) -> None:
        """Begin to read the KV for `blocks` but the first `skip`. Ask `has_room` first."""
        target = list(blocks[skip:])
        staged = self._take(len(target))
        self._pulling[incoming.handoff_id] = (staged, target)
        self._inner.start_pull(incoming, [0] * skip + staged, skip)

    def finished_pulls(self) -> list[PullResult]:
        """Pulls that ended since the last call, their KV in the pool; waits for copies alone."""
        ended = self._inner.finished_pulls()
        for result in ended:
            staged, target = self._pulling.pop(result.handoff_id)
            if result.code is None:
                self._to_pool(staged, target)
            self._release(staged)
        return ended

    def fileno(self) -> int:
        """Readable when a pull has ended."""
        return self._inner.fileno()

    # --- both

    def has_room(self, num_blocks: int) -> bool:
        """Whether so many blocks can be pinned or pulled now."""
        return num_blocks <= len(self._free)

    def reset(self, epoch: int) -> None:
        """Go on under a new epoch; what was offered is void. Pulls under way end as ever."""
        self._inner.reset(epoch)
        for handoff_id in list(self._pinned):
            self._release(self._pinned.pop(handoff_id))

    def close(self) -> None:
        """Stop serving; wait for pulls under way."""
        self._inner.close()
        if self._locked:
            self._locked = False
            _unlock_pages(self._region)

    def check(self) -> None:
        """Every staging block is free or has one holder. Raises InvariantError with numbers."""
        pinned = [block for blocks in self._pinned.values() for block in blocks]
        pulling = [block for blocks, _ in self._pulling.values() for block in blocks]
        total = self._region.num_blocks
        if sorted(self._free + pinned + pulling) != list(range(total)):
            raise InvariantError(
                f"staging: free {len(self._free)} + pinned {len(pinned)} + pulling {len(pulling)} "
                f"!= total {total}, or a block is there twice"
            )

    def _take(self, count: int) -> list[int]:
        """Blocks for new content, generations bumped. Raises InvariantError without room."""
        if count > len(self._free):
            raise InvariantError(f"{count} staging blocks taken of {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        self._region.bump(taken)
        return taken

    def _release(self, staged: list[int]) -> None:
        self._free += reversed(staged)

    def _to_host(self, blocks: Sequence[int], staged: list[int]) -> None:
        """Returns when the copy is complete."""
        device = self._pool_NX.device
        gathered_nX = self._pool_NX.index_select(0, torch.tensor(blocks, device=device))
        for first, at, count in runs(range(len(staged)), staged):
            piece = gathered_nX[first : first + count]
            self._stage_SX[at : at + count].copy_(piece, non_blocking=True)
        _synchronize(device)

    def _to_pool(self, staged: list[int], target: list[int]) -> None:
        """Returns when the staging blocks may be written again."""
        device = self._pool_NX.device
        arrived_nX = self._pool_NX.new_empty(len(staged), self._pool_NX.shape[1])
        for at, first, count in runs(staged, range(len(staged))):
            piece = self._stage_SX[at : at + count]
            arrived_nX[first : first + count].copy_(piece, non_blocking=True)
        self._pool_NX.index_copy_(0, torch.tensor(target, device=device), arrived_nX)
        _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _lock_pages(region: Region, device: torch.device) -> bool:
    """Let CUDA copy from and to the region at full speed. It works without, too: only logged."""
    size = region.num_blocks * region.block_bytes
    try:
        torch.cuda.check_error(_cudart().cudaHostRegister(region.address, size, 0))
    except (RuntimeError, AttributeError) as error:
        logger.warning("the staging area of %d bytes stays pageable: %s", size, error)
        with contextlib.suppress(RuntimeError):  # CUDA tells an error again to whoever comes next
            torch.zeros(1, device=device).add_(1)
        return False
    return True


def _unlock_pages(region: Region) -> None:
    try:
        torch.cuda.check_error(_cudart().cudaHostUnregister(region.address))
    except (RuntimeError, AttributeError) as error:
        logger.warning("the staging area stays locked: %s", error)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
