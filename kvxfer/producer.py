"""The end that has the KV: pins blocks, describes them, lets them go.

With several ranks each has a producer of its own, whose layout tells its rank; `merge_parts` joins
what they made of one prompt.

From `pin` to `unpin` (or `reset`) the blocks belong to the producer: nobody may write to them or
give them away. Called by the engine's thread; the descriptors travel to readers by other means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from kvxfer.checksum import block_sums, require_torch
from kvxfer.descriptor import KVDescriptor, KVPart, token_hash
from kvxfer.errors import KVTransferError, KVUsageError
from kvxfer.layout import KVLayout
from kvxfer.region import Region
from kvxfer.transports.base import Address, Transport

logger = logging.getLogger(__name__)


class KVProducer:
    """Pins blocks of one region. `producer` is the worker's life, `host` its machine."""

    def __init__(
        self,
        region: Region,
        transports: Sequence[Transport],
        *,
        layout: KVLayout,
        producer: str,
        host: str,
        epoch: int = 0,
        optional: bool = False,
        checksum: bool = False,
    ) -> None:
        """`optional`: a transport that cannot serve this region is left out with a warning, as
        long as another can; else it is an error. `checksum`: descriptors carry checksums of their
        blocks (`kvxfer.checksum`), which readers verify; they are computed by torch."""
        if region.block_bytes != layout.block_bytes:
            raise KVUsageError(f"blocks of {region.block_bytes}, layout of {layout.block_bytes}")
        if checksum:
            require_torch()
        self.region, self.layout, self.checksum = region, layout, checksum
        self.producer, self.host = producer, host
        region.epoch = epoch
        self._transports = list(transports)
        self.endpoints: dict[str, Address] = {}
        for transport in self._transports:
            try:
                self.endpoints[transport.name] = transport.serve(region)
            except (KVTransferError, OSError) as error:
                if not optional or (transport is self._transports[-1] and not self.endpoints):
                    raise
                logger.warning("%s does not serve: %s", transport.name, error)
        self._pinned: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def pin(
        self,
        handoff_id: str,
        block_ids: Sequence[int],
        token_ids: Sequence[int],
        payload: bytes = b"",
        *,
        checksum: bool | None = None,
    ) -> KVDescriptor:
        """The blocks hold the KV of `token_ids`, the last one perhaps in part. Raises KVUsageError
        for an id that is pinned already, for too few or too many blocks, for one that the region
        has not.

        Checksums are computed here, after what the current stream of a device was told before;
        `checksum` says whether, other than this producer does. If a device has no memory for them,
        torch's error comes through and nothing is pinned.
        """
        blocks = tuple(block_ids)
        self.region.check(blocks)
        if len(blocks) != -(-len(token_ids) // self.layout.block_size):
            size = self.layout.block_size
            raise KVUsageError(f"{len(blocks)} blocks of {size} for {len(token_ids)} tokens")
        sums: tuple[int, ...] = ()
        if self.checksum if checksum is None else checksum:
            sums = block_sums(self.region, self.layout, blocks, len(token_ids))
        with self._lock:
            if handoff_id in self._pinned:
                raise KVUsageError(f"{handoff_id} is pinned already")
            self._pinned[handoff_id] = blocks
        part = KVPart(
            rank=self.layout.tp_rank,
            epoch=self.region.epoch,
            block_ids=blocks,
            generations=tuple(self.region.stamps(blocks)),
            endpoints=self.endpoints,
            checksums=sums,
        )
        return KVDescriptor(
            id=handoff_id,
            producer=self.producer,
            host=self.host,
            layout=self.layout.fingerprint,
            block_size=self.layout.block_size,
            tp_size=self.layout.tp_size,
            parts=(part,),
            num_tokens=len(token_ids),
            token_hash=token_hash(token_ids),
            num_bytes=len(blocks) * self.layout.block_bytes,
            payload=payload,
            created_at=time.time(),
        )

    def unpin(self, handoff_id: str) -> tuple[int, ...]:
        """The blocks are the caller's again; () for an id that is not pinned."""
        with self._lock:
            return self._pinned.pop(handoff_id, ())

    def reset(self, epoch: int) -> list[tuple[int, ...]]:
        """A new life: every descriptor given out before is stale from now on. Returns all blocks
        that were pinned."""
        with self._lock:
            self.region.epoch = epoch
            freed = list(self._pinned.values())
            self._pinned.clear()
        self.region.bump(block for blocks in freed for block in blocks)
        return freed

    @property
    def num_pinned(self) -> int:
        """Hand-offs that are pinned."""
        return len(self._pinned)

    def close(self) -> None:
        """Stop serving; the region stays the caller's."""
        for transport in self._transports:
            transport.close()
