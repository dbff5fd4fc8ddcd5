"""Within one process: a copy, and every fault that a real way can have, on order.

For tests of engines and for engines that share a process. `faults` are used up one by one, oldest
first, by the reads that come.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kvxfer.errors import KVUsageError, PeerLost, Revoked, TransferTimeout
from kvxfer.plan import ReadPlan
from kvxfer.region import Region
from kvxfer.transports.base import Address, Stamp, check_source, text

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
        """See `Transport`. Raises KVUsageError for memory that is not the host's."""
        _check_host(region)
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
        plan: ReadPlan,
        destination: Region,
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`."""
        fault = self.faults.popleft() if self.faults else None
        source = _served.get(text(address, "region"))
        if source is None:
            raise PeerLost(f"no region {address['region']} in this process")
        if not source.open:
            raise Revoked("the region was revoked")
        _check_host(destination)
        check_source(plan, source.num_blocks, source.block_bytes)
        if fault and fault.kind in ("delay", "drop"):
            time.sleep(min(fault.seconds, timeout_s))
            if fault.kind == "drop" or fault.seconds >= timeout_s:
                raise TransferTimeout(f"no answer within {timeout_s} s")
        if fault and fault.kind == "die":
            pieces = plan.pieces()
            copy_pieces(source.address, pieces[: len(pieces) // 2], destination.address)
            raise PeerLost("the peer died during the read")
        copy_pieces(source.address, plan.pieces(), destination.address)
        if fault and fault.kind == "corrupt":
            destination.buffer[plan.pieces()[0][1]] ^= 0xFF
        if fault and fault.kind == "reuse":
            source.bump(plan.src_blocks[:1])
        if not source.open:
            raise Revoked("the region was revoked during the read")
        epoch = source.epoch + (1 if fault and fault.kind == "stale_epoch" else 0)
        return Stamp(epoch, source.stamps(plan.src_blocks))

    def close(self) -> None:
        """See `Transport`."""
        with _lock:
            for region in self._mine:
                _served.pop(region, None)
        self._mine.clear()


def _check_host(region: Region) -> None:
    if region.device != "cpu":
        raise KVUsageError(f"mem copies host memory, not that of {region.device}")


def copy_pieces(source: int, pieces: Iterable[tuple[int, int, int]], destination: int) -> None:
    """memmove of each piece; the interpreter's lock is let go meanwhile.

    `source` and `destination`: where the regions' blocks 0 lie in this process.
    """
    for src, dst, num_bytes in pieces:
        ctypes.memmove(destination + dst, source + src, num_bytes)
