"""Within one process: a copy, and every fault that a real way can have, on order.

For tests of engines and for engines that share a process. `faults` are used up one by one, oldest
first, by the reads that come.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvxfer.errors import BadDescriptor, PeerLost, Revoked, TransferTimeout
from kvxfer.region import Region, runs
from kvxfer.transports.base import Address, Stamp, text

_served: dict[str, Region] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Fault:
    """What shall happen to one read."""

    kind: Literal["delay", "drop", "die", "corrupt", "stale_epoch", "reuse"]
    """delay: sleeps `seconds` first. drop: times out. die: half of the blocks come, then the peer
    is gone. corrupt: one byte is flipped. stale_epoch: the peer began a new life. reuse: a block
    was given to other content during the read."""
    seconds: float = 0.0


class MemTransport:
    """See the module."""

    name = "mem"

    def __init__(self) -> None:
        self.faults: deque[Fault] = deque()
        self._mine: list[str] = []

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`."""
        with _lock:
            _served[region.id] = region
        self._mine.append(region.id)
        return {"region": region.id}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return text(address, "region") in _served

    def read(
        self,
        address: Address,
        src_blocks: Sequence[int],
        destination: Region,
        dst_blocks: Sequence[int],
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`."""
        fault = self.faults.popleft() if self.faults else None
        source = _served.get(text(address, "region"))
        if source is None:
            raise PeerLost(f"no region {address['region']} in this process")
        if not source.open:
            raise Revoked("the region was revoked")
        if source.block_bytes != destination.block_bytes:
            raise BadDescriptor(f"blocks of {source.block_bytes} bytes there")
        if src_blocks and max(src_blocks) >= source.num_blocks:
            raise BadDescriptor(f"no block {max(src_blocks)} in that region")
        if fault and fault.kind in ("delay", "drop"):
            time.sleep(min(fault.seconds, timeout_s))
            if fault.kind == "drop" or fault.seconds >= timeout_s:
                raise TransferTimeout(f"no answer within {timeout_s} s")
        if fault and fault.kind == "die":
            half = len(src_blocks) // 2
            copy_blocks(source.address, src_blocks[:half], destination, dst_blocks[:half])
            raise PeerLost("the peer died during the read")
        copy_blocks(source.address, src_blocks, destination, dst_blocks)
        if fault and fault.kind == "corrupt" and dst_blocks:
            destination.block(dst_blocks[0])[0] ^= 0xFF
        if fault and fault.kind == "reuse":
            source.bump(src_blocks[:1])
        if not source.open:
            raise Revoked("the region was revoked during the read")
        epoch = source.epoch + (1 if fault and fault.kind == "stale_epoch" else 0)
        return Stamp(epoch, source.stamps(src_blocks))

    def close(self) -> None:
        """See `Transport`."""
        with _lock:
            for region in self._mine:
                _served.pop(region, None)
        self._mine.clear()


def copy_blocks(
    source_address: int, src_blocks: Sequence[int], destination: Region, dst_blocks: Sequence[int]
) -> None:
    """memmove of whole blocks, neighbours in one piece; the interpreter lock is let go meanwhile.

    `source_address`: where block 0 of the source lies in this process.
    """
    size = destination.block_bytes
    for src, dst, count in runs(src_blocks, dst_blocks):
        ctypes.memmove(destination.address + dst * size, source_address + src * size, count * size)
