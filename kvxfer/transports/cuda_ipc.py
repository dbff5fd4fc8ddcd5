"""Between GPUs of one machine, and between processes on one GPU: read the peer's pool where it is.

A reader opens the peer's pool once, through CUDA IPC and with its own device current, and from then
on copies blocks from it into its own on a stream of its own (`kvxfer.cuda.ways`). The peer takes no
part in a read: epoch and generations are read from its header's memfd, mapped as `shm` does, after
the last byte has arrived, and so is whether it is still alive.

Address: where the producer's control connection listens, the region, the device's UUID, the process
and the header's descriptor. What opens the pool is told over the control connection alone, to who
knows the cluster's secret. A peer's pool is let go when the peer dies, or within a second or so
after it revoked it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from typing import Any

from kvxfer.control import ControlClient, ControlServer, Message, Session
from kvxfer.cuda.driver import HANDLE_BYTES, driver, ordinal_of
from kvxfer.cuda.lanes import Lanes
from kvxfer.cuda.memory import export
from kvxfer.cuda.mover import By
from kvxfer.cuda.pace import Pace
from kvxfer.cuda.ways import Kind, Pool, Way, open_way
from kvxfer.errors import (
    BadDescriptor,
    KVUsageError,
    PeerLost,
    Revoked,
    TransferTimeout,
    TransportError,
)
from kvxfer.plan import ReadPlan
from kvxfer.region import DeviceRegion, Region
from kvxfer.transports import wire
from kvxfer.transports.base import Address, Stamp, check_source, number, text
from kvxfer.transports.mappings import Mapped, Mappings, start_time

_served: weakref.WeakValueDictionary[str, Region] = weakref.WeakValueDictionary()
"""Of this process: a process cannot open what it exports itself."""


class CudaIpcTransport:
    """See the module. `host` is this machine's name, as descriptors carry it.

    `way` and `by` choose how the blocks come, `auto` by what the devices report
    (`kvxfer.cuda.ways`, `kvxfer.cuda.mover`). Whole blocks need no Triton: the copy engines move
    them. `pace.bytes_per_s` limits what comes on average (`kvxfer.cuda.pace`); 0, as at first: as
    much as the link gives.
    """

    name = "cuda_ipc"

    def __init__(
        self,
        secret: str,
        *,
        host: str,
        listen_host: str = "127.0.0.1",
        way: Kind = "auto",
        by: By = "auto",
    ) -> None:
        self._secret, self._host, self._listen = secret.encode(), host, (listen_host, 0)
        self._way, self._by = way, by
        self._server: ControlServer | None = None
        self._offers: dict[str, tuple[Region, Message]] = {}
        self.pace = Pace()
        self._maps = Mappings(looks=True)
        weakref.finalize(self, self._maps.clear).atexit = False
        self._lanes: dict[int, Lanes] = {}
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self.num_opened = 0
        """Pools of peers that were opened so far."""

    # --- producer

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`. The region must lie on a CUDA device, in memory that can be exported.

        Raises KVUsageError, OSError where it cannot listen.
        """
        if not isinstance(region, DeviceRegion) or not region.device.startswith("cuda"):
            raise KVUsageError(f"cuda_ipc serves regions on CUDA devices, not on {region.device}")
        device = driver().uuid(ordinal_of(region.device))
        handle, offset, size = export(region)
        offer = {"handle": handle.hex(), "offset": offset, "bytes": size, "device": device}
        with self._lock:
            self._offers[region.id] = region, offer
            _served[region.id] = region
            if self._server is None:
                self._server = ControlServer(
                    self._listen, self._secret, self._answer, "kvxfer-cuda-ipc"
                )
            host, port = self._server.address
        pid = os.getpid()
        return {
            "host": host,
            "port": port,
            "region": region.id,
            "device": device,
            "pid": pid,
            "start": start_time(pid),
            "fd": region.fd,
        }

    def _answer(self, session: Session, request: Message) -> Message:
        region, offer = self._offers.get(request["region"], (None, {}))
        if region is None or not region.open:
            raise Revoked("the peer no longer lets that region be read")
        return offer

    # --- consumer

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        if host != self._host:
            return False
        try:
            return driver().num_devices > 0
        except TransportError:
            return False

    def read(
        self, address: Address, plan: ReadPlan, destination: Region, timeout_s: float
    ) -> Stamp:
        """See `Transport`. What runs on the device has no time-out; the peer takes no part."""
        device = ordinal_of(destination.device)
        try:
            pool = self._pool(address, device, timeout_s)
            if not pool.open:
                self._check(pool)
            check_source(plan, pool.num_blocks, pool.block_bytes)
            if self.pace.bytes_per_s:
                self.pace.take(plan.num_bytes, timeout_s)
            with self._lanes_of(device).use() as lane:
                pool.way.copy(lane, plan, destination.address)
        except MemoryError as error:
            raise TransportError(f"out of memory: {error}", errno=errno.ENOMEM) from error
        generations = pool.generations
        stamp = Stamp(pool.epoch, [generations[block] for block in plan.src_blocks])
        self._check(pool)
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            server, self._server = self._server, None
            lanes, self._lanes = list(self._lanes.values()), {}
            self._offers.clear()
        if server is not None:
            server.close()
        self._maps.clear()
        for found in lanes:
            found.close()

    def _lanes_of(self, device: int) -> Lanes:
        found = self._lanes.get(device)
        if found is None:
            with self._lock:
                found = self._lanes.setdefault(device, Lanes(device))
        return found

    def _pool(self, address: Address, device: int, timeout_s: float) -> _Opened:
        """The peer's pool, opened if nobody has yet; others wait for who does."""
        key = f"{text(address, 'region')} {device}"
        found = self._maps.find(key)
        if found is None:
            deadline = time.monotonic() + timeout_s
            if not self._opening.acquire(timeout=timeout_s):
                raise TransferTimeout(f"another read waits for the same peer, {timeout_s} s so far")
            try:
                found = self._maps.find(key)
                if found is None:
                    offer = self._ask(address, deadline, timeout_s)
                    found = self._maps.keep(
                        _Opened(address, key, offer, device, self._way, self._by)
                    )
                    self.num_opened += 1
            finally:
                self._opening.release()
        assert isinstance(found, _Opened)
        return found

    def _ask(self, address: Address, deadline: float, timeout_s: float) -> Message:
        where = (text(address, "host"), number(address, "port"))
        try:
            client = ControlClient(where, self._secret, wire.left(deadline))
            try:
                return client.ask({"region": text(address, "region")}, wire.left(deadline))
            finally:
                client.close()
        except TimeoutError as error:
            raise TransferTimeout(f"{where[0]} gave no answer in {timeout_s} s") from error

    def _check(self, pool: _Opened) -> None:
        """Revoked before dead: an owner that says goodbye does both."""
        if not pool.open:
            self._maps.forget(pool)
            raise Revoked("the region was revoked")
        if pool.process.is_gone():
            self._maps.forget(pool)
            raise PeerLost(f"process {pool.process.pid} is gone")


class _Opened(Mapped):
    """A peer's header, mapped, and its pool, opened; both are let go with the last reference."""

    has_blocks = False

    def __init__(
        self, address: Address, key: str, offer: Message, device: int, way: Kind, by: By
    ) -> None:
        super().__init__(address)
        self.key = key
        if not self.open:
            raise Revoked("the region was revoked")
        self.way: Way = open_way(self._described(address, offer), device, way, by)
        weakref.finalize(self, self.way.close).atexit = False

    def _described(self, address: Address, offer: Message) -> Pool:
        """What the peer said, looked at. Raises BadDescriptor."""
        device, handle = text(offer, "device"), bytes.fromhex(text(offer, "handle"))
        offset, size = number(offer, "offset"), number(offer, "bytes")
        if text(address, "device") != device or len(handle) != HANDLE_BYTES:
            raise BadDescriptor("an address of another pool than the peer's")
        if offset + self.num_blocks * self.block_bytes > size:
            raise BadDescriptor("a pool that is too short for its blocks")
        local = _served.get(self.region) if self.process.pid == os.getpid() else None
        return Pool(device, handle, offset, None if local is None else local.address)
