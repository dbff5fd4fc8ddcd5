"""The end that wants the KV: pulls blocks into its own, and proves them before they are used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvxfer import checksum
from kvxfer.descriptor import KVDescriptor, KVPart
from kvxfer.errors import (
    KVUsageError,
    NoTransport,
    StaleEpoch,
    StaleGeneration,
    TransferTimeout,
    TransportError,
)
from kvxfer.geometry import plan_reads
from kvxfer.layout import KVLayout
from kvxfer.plan import ReadPlan
from kvxfer.region import Region
from kvxfer.transports.base import Stamp, Transport

logger = logging.getLogger(__name__)

_THREADS = 4
"""Parts that are read at once beside the caller's own, of all pulls together."""


class PullStats(NamedTuple):
    """What one pull took."""

    num_bytes: int
    """Of all parts."""
    seconds: float
    transport: str
    """Those that were used, joined by commas where parts came by different ones."""


_Read = tuple[KVDescriptor, KVPart, ReadPlan, float]
"""One part on its way: of what, which, what of it, until when."""


class KVConsumer:
    """Pulls into one region, each part by the first transport (best first) that both ends have.

    Safe to call from several threads at once, for different destination blocks.
    """

    def __init__(
        self, region: Region, transports: Sequence[Transport], *, layout: KVLayout
    ) -> None:
        if region.block_bytes != layout.block_bytes:
            raise KVUsageError(f"blocks of {region.block_bytes}, layout of {layout.block_bytes}")
        self.region, self.layout = region, layout
        self._transports = list(transports)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def pull(
        self,
        descriptor: KVDescriptor,
        dst_block_ids: Sequence[int],
        *,
        skip_blocks: int = 0,
        timeout_s: float = 20.0,
    ) -> PullStats:
        """Copies the KV from our block `skip_blocks` on into `dst_block_ids`.

        Producer and reader may differ in block size and in ranks (`kvxfer.geometry`); parts of
        several ranks are read side by side. Returns only if layout, epoch and the generation of
        every block that was read are proved, the latter two after the last byte came; and so are
        the checksums, where the producer gave some (`kvxfer.checksum`). Raises LayoutMismatch,
        PoolExhausted, BadDescriptor (an address that makes no sense, a rank that is missing),
        KVUsageError (blocks that are not in our region), StaleEpoch, StaleGeneration,
        ChecksumMismatch, TransportError and its kinds; the destination then holds nothing of use.
        What the tokens are is the caller's to prove: `descriptor.prove_tokens`.
        """
        reads = plan_reads(descriptor, self.layout, dst_block_ids, skip_blocks)
        self.region.check(dst_block_ids)
        start = time.perf_counter()
        if not reads:
            return PullStats(0, 0.0, "none")
        todo: list[_Read] = []
        num_bytes, has_sums = 0, False
        for index, plan in reads:
            part = descriptor.parts[index]
            todo.append((descriptor, part, plan, start + timeout_s))
            num_bytes += plan.num_bytes
            has_sums = has_sums or bool(part.checksums)
        if has_sums:
            checksum.check(descriptor, self.layout)
        name = self._part(todo[0]) if len(todo) == 1 else self._side_by_side(todo)
        if has_sums:
            checksum.verify(descriptor, self.region, self.layout, dst_block_ids, skip_blocks)
        return PullStats(num_bytes, time.perf_counter() - start, name)

    def close(self) -> None:
        """Let go of what was opened at peers."""
        for transport in self._transports:
            transport.close()
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()

    def _side_by_side(self, reads: Sequence[_Read]) -> str:
        """All parts, the first one here; by which transports. When it returns or raises, none is
        under way."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvxfer-part")
            threads = self._threads
        others = [threads.submit(self._part, read) for read in reads[1:]]
        asked: list[Callable[[], str]] = [lambda: self._part(reads[0])]
        asked += [other.result for other in others]
        names, failed = [], None
        for ask in asked:
            try:
                names.append(ask())
            except Exception as error:
                failed = failed or error
        if failed is not None:
            try:
                raise failed
            finally:
                del failed, others, asked, ask
        return ",".join(dict.fromkeys(names))

    def _part(self, read: _Read) -> str:
        """Read and prove one part; by which transport."""
        descriptor, part, plan, _ = read
        stamp, name = self._read(read)
        prove(descriptor.id, part, plan, stamp)
        return name

    def _read(self, read: _Read) -> tuple[Stamp, str]:
        descriptor, part, plan, deadline = read
        failed: TransportError | None = None
        for transport in self._transports:
            address = part.endpoints.get(transport.name)
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
        raise NoTransport(f"the producer offers {list(part.endpoints)}, we have {ours}")


def prove(handoff_id: str, part: KVPart, plan: ReadPlan, stamp: Stamp) -> None:
    """Raises StaleEpoch or StaleGeneration unless the bytes are those that were published."""
    if stamp.epoch != part.epoch:
        raise StaleEpoch(
            f"{handoff_id} was published in epoch {part.epoch}, now it is {stamp.epoch}"
        )
    expected = part.generations[len(part.generations) - len(plan.src_blocks) :]
    if tuple(stamp.generations) != expected:
        changed = sum(a != b for a, b in zip(stamp.generations, expected, strict=True))
        raise StaleGeneration(f"{changed} of {len(expected)} blocks of {handoff_id} were reused")
