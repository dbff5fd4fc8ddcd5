"""The end that wants the KV: pulls blocks into its own, and proves them before they are used."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvxfer.descriptor import KVDescriptor
from kvxfer.errors import (
    KVUsageError,
    LayoutMismatch,
    NoTransport,
    PoolExhausted,
    StaleEpoch,
    StaleGeneration,
    TransferTimeout,
    TransportError,
)
from kvxfer.layout import KVLayout
from kvxfer.plan import ReadPlan, whole_blocks
from kvxfer.region import Region
from kvxfer.transports.base import Stamp, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PullStats:
    """What one pull took."""

    num_bytes: int
    seconds: float
    transport: str


class KVConsumer:
    """Pulls into one region, by the first transport (best first) that both ends have.

    Safe to call from several threads at once, for different destination blocks.
    """

    def __init__(
        self, region: Region, transports: Sequence[Transport], *, layout: KVLayout
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise KVUsageError(f"blocks of {region.block_bytes}, layout of {layout.block_bytes}")
        self.region, self.layout = region, layout
        self._transports = list(transports)

    def pull(
        self,
        descriptor: KVDescriptor,
        dst_block_ids: Sequence[int],
        *,
        skip_blocks: int = 0,
        timeout_s: float = 20.0,
    ) -> PullStats:
        """Copies the descriptor's blocks from `skip_blocks` on into `dst_block_ids`.

        Returns only if layout, epoch and the generation of every copied block are proved, the
        latter two after the last byte came. Raises LayoutMismatch, PoolExhausted, BadDescriptor
        (an address that makes no sense), KVUsageError (blocks that are not in our region),
        StaleEpoch, StaleGeneration, TransportError and its kinds; the destination then holds
        nothing of use. What the tokens are is the caller's to prove: `descriptor.prove_tokens`.
        """
        if descriptor.layout != self.layout.fingerprint:
            raise LayoutMismatch(
                f"the producer's layout is {descriptor.layout}, ours {self.layout.fingerprint}"
            )
        if skip_blocks < 0:
            raise KVUsageError(f"{skip_blocks} blocks to skip")
        source = descriptor.block_ids[skip_blocks:]
        if len(dst_block_ids) != len(source):
            raise PoolExhausted(f"{len(source)} blocks to pull, {len(dst_block_ids)} to put them")
        self.region.check(dst_block_ids)
        start = time.perf_counter()
        if not source:
            return PullStats(0, 0.0, "none")
        plan = whole_blocks(source, dst_block_ids, self.layout.block_bytes)
        stamp, name = self._read(descriptor, plan, start + timeout_s)
        prove(descriptor, stamp, skip_blocks)
        num_bytes = len(source) * self.layout.block_bytes
        return PullStats(num_bytes, time.perf_counter() - start, name)

    def close(self) -> None:
        """Let go of what was opened at peers."""
        for transport in self._transports:
            transport.close()

    def _read(self, descriptor: KVDescriptor, plan: ReadPlan, deadline: float) -> tuple[Stamp, str]:
        failed: TransportError | None = None
        for transport in self._transports:
            address = descriptor.endpoints.get(transport.name)
            if address is None or not transport.reaches(address, descriptor.host):
                continue
            left_s = deadline - time.perf_counter()
            if left_s <= 0:
                failed = failed or TransferTimeout("no time was left to begin")
                break
            try:
                found = transport.read(address, plan, self.region, left_s)
                return found, transport.name
            except TransportError as error:
                failed = error
                logger.warning(
                    "%s: %s failed (%s, errno %s): %s",
                    descriptor.id,
                    transport.name,
                    type(error).__name__,
                    error.errno,
                    str(error),
                )
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # else this frame and the error keep each other, and a peer's mapping
        ours = [transport.name for transport in self._transports]
        raise NoTransport(f"the producer offers {list(descriptor.endpoints)}, we have {ours}")


def prove(descriptor: KVDescriptor, stamp: Stamp, skip_blocks: int = 0) -> None:
    """Raises StaleEpoch or StaleGeneration unless the bytes are those that were published."""
    if stamp.epoch != descriptor.epoch:
        raise StaleEpoch(
            f"{descriptor.id} was published in epoch {descriptor.epoch}, now it is {stamp.epoch}"
        )
    expected = descriptor.generations[skip_blocks:]
    if tuple(stamp.generations) != expected:
        changed = sum(a != b for a, b in zip(stamp.generations, expected, strict=True))
        raise StaleGeneration(f"{changed} of {len(expected)} blocks of {descriptor.id} were reused")
