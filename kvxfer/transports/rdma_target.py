"""Our own regions that reads go into: registered at the first, until they are revoked or gone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from kvxfer.errors import KVUsageError
from kvxfer.region import Region
from kvxfer.transports.rdma_device import Device, Spot, close_each
from kvxfer.transports.rdma_memory import Registered, register_blocks
from kvxfer.transports.rdma_verbs import LOCAL_WRITE


class Target(NamedTuple):
    """A region to read into; no spots where its blocks are staged."""

    region: Region
    spots: list[Spot]


class Targets:
    """By region. Safe to share among threads."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._known: dict[str, Registered | None] = {}
        self._lock = threading.RLock()  # a region may be collected while we hold it

    def get(self, region: Region) -> Target:
        """Raises TransportError where it cannot be registered, KVUsageError for a closed one."""
        with self._lock:
            if region.open and region.id not in self._known:
                self._known[region.id] = register_blocks(self._devices, region, LOCAL_WRITE)
                forget = partial(_forget, weakref.ref(self), region.id)
                region.on_revoke.append(forget)
                weakref.finalize(region, forget).atexit = False
            if not region.open:
                self.forget(region.id)
                raise KVUsageError("the destination was closed")
            found = self._known[region.id]
            return Target(region, found.spots if found is not None else [])

    def forget(self, region_id: str) -> None:
        """Deregister it."""
        with self._lock:
            found = self._known.pop(region_id, None)
        if found is not None:
            found.close()

    def close(self) -> None:
        """Deregister all. No read is under way."""
        with self._lock:
            known, self._known = self._known, {}
        close_each([found for found in known.values() if found is not None])


def _forget(targets: weakref.ref[Targets], region_id: str) -> None:
    known = targets()
    if known is not None:
        known.forget(region_id)
