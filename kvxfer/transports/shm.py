"""Between processes of one machine and user: map the peer's region once, then copy.

The peer takes no part in a read, so one that is stopped can still be read; what was copied is
proved by the epoch and the generations in the mapped memory, and by the peer's being alive.

A read of 1 MiB is a copy of 0.1 ms, and the interpreter comes to it with cold caches: each call of
a function costs about 1 us then. So `read` calls few.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from kvxfer.errors import KVUsageError, PeerLost, Revoked
from kvxfer.plan import ReadPlan
from kvxfer.region import EPOCH, OPEN, Region
from kvxfer.transports.base import Address, Stamp, check_source
from kvxfer.transports.copier import Copier, default_threads
from kvxfer.transports.mappings import Mapped, Mappings, start_time


class ShmTransport:
    """See the module. `host` is this machine's name, as descriptors carry it; `threads` copy a
    large read at once, `copier.default_threads` of them unless told. Raises KVUsageError."""

    name = "shm"

    def __init__(self, host: str, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise KVUsageError(f"{threads} threads")
        self._host = host
        self._copier = Copier(threads or default_threads())
        self._maps = Mappings()
        weakref.finalize(self, self._maps.clear).atexit = False

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`. The region must be a shared one, in host memory. Raises KVUsageError."""
        if region.fd < 0 or region.device != "cpu":
            raise KVUsageError("shm needs a region of the host that is shared and not closed")
        pid = os.getpid()
        return {"pid": pid, "start": start_time(pid), "fd": region.fd, "region": region.id}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return host == self._host

    def read(
        self,
        address: Address,
        plan: ReadPlan,
        destination: Region,
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`. A copy in memory has no time-out; the peer takes no part in it."""
        mapped = self._maps.get(address)
        head = mapped.head
        if not head[OPEN]:
            self._check(mapped)
        check_source(plan, mapped.num_blocks, mapped.block_bytes)
        self._copier.copy(mapped.address, plan, destination.address)
        stamp = Stamp(head[EPOCH], list(map(mapped.generations.__getitem__, plan.src_blocks)))
        if not head[OPEN] or mapped.process.is_gone():
            self._check(mapped)
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        self._maps.clear()
        self._copier.close()

    def _check(self, mapped: Mapped) -> None:
        """Revoked before dead: an owner that says goodbye does both."""
        if not mapped.open:
            self._maps.forget(mapped)
            raise Revoked("the region was revoked")
        if mapped.process.is_gone():
            self._maps.forget(mapped)
            raise PeerLost(f"process {mapped.process.pid} is gone")
