"""Over RDMA: the reader's NICs fetch blocks out of the producer's memory, whose processor sleeps.

What is read is told over a control connection (`kvxfer.control`) to those who know the secret: keys
and addresses are never in descriptors. Blocks in host memory are read straight from one region into
the other; those of a GPU too, where driver, kernel and NICs know dmabuf, else through rings of
page-locked memory. `rdma_settings` tells which variables are honoured.

    rdma_link, rdma_flow, rdma_queue   the reader: connection, striping, chains of requests
    rdma_serve                         the producer
    rdma_memory, rdma_target, rdma_staging   registered memory: regions, our own, rings
    rdma_device, rdma_verbs, rdma_status     device, binding, completions as errors
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from typing import Any

from kvxfer.errors import BadDescriptor, KVUsageError, PeerLost, TransferTimeout
from kvxfer.plan import ReadPlan
from kvxfer.region import Region
from kvxfer.transports import rdma_verbs
from kvxfer.transports.base import Address, Stamp, number, text
from kvxfer.transports.rdma_device import close_each, open_devices
from kvxfer.transports.rdma_link import Link
from kvxfer.transports.rdma_serve import RdmaServer
from kvxfer.transports.rdma_settings import RdmaSettings, interface_address
from kvxfer.transports.rdma_staging import MakeCopies, cuda_copies
from kvxfer.transports.rdma_target import Targets
from kvxfer.transports.rdma_verbs import Verbs

logger = logging.getLogger(__name__)
_IDLE_KEPT = 8
_MOST_NICS = 32
Key = tuple[str, int, int]
"""Host and port of a producer, its number of NICs"""


class RdmaTransport:
    """See the module. Opens the NICs at construction; good until `close`.

    Listens on `listen_host` once it serves, on the address of KVCACHE_SOCKET_IFNAME where that is
    set. Raises UnusableTransport, a KVUsageError, where pyverbs or a device is missing: it says
    what to install.
    """

    name = "rdma"

    def __init__(
        self,
        secret: str,
        *,
        listen_host: str = "127.0.0.1",
        port: int = 0,
        settings: RdmaSettings | None = None,
        verbs: Verbs | None = None,
        make_copies: MakeCopies = cuda_copies,
    ) -> None:
        self._settings = settings or RdmaSettings.from_env(os.environ)
        if self._settings.socket_ifname:
            listen_host = interface_address(self._settings.socket_ifname)
        self._secret, self._listen, self._make_copies = (
            secret.encode(),
            (listen_host, port),
            make_copies,
        )
        self._devices = open_devices(verbs or rdma_verbs.load(), self._settings)
        self._targets = Targets(self._devices)
        self._server: RdmaServer | None = None
        self._idle: defaultdict[Key, list[Link]] = defaultdict(list)
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`. Raises OSError where it cannot listen, TransportError where the memory
        cannot be registered, KVUsageError when closed."""
        with self._lock:
            self._check_open()
            if self._server is None:
                self._server = RdmaServer(
                    *(self._listen, self._secret, self._devices, self._settings),
                    self._make_copies,
                )
            server = self._server
        server.add(region)
        host, port = server.address
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        nics = [device.nic for device in self._devices]
        return {"host": host, "port": port, "region": region.id, "nics": nics}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return bool(address.get("port")) and bool(address.get("nics"))

    def read(
        self, address: Address, plan: ReadPlan, destination: Region, timeout_s: float
    ) -> Stamp:
        """See `Transport`."""
        key = (text(address, "host"), number(address, "port"), _count(address))
        region = text(address, "region")
        deadline = time.monotonic() + timeout_s
        self._begin()
        link: Link | None = None
        try:
            target = self._targets.get(destination)
            link = self._take(key) or self._connect(key, deadline)
            stamp = link.read(region, plan, target, deadline)
            self._keep(key, link)
            link = None
            return stamp
        except TimeoutError as error:
            raise TransferTimeout(
                f"{key[0]} gave no answer in {timeout_s} s", errno=errno.ETIMEDOUT
            ) from error
        except OSError as error:
            raise PeerLost(f"{key[0]}: {error}", errno=error.errno) from error
        finally:
            if link is not None:
                _close(link)
            self._end()

    def close(self) -> None:
        """See `Transport`. Reads that are under way come to their end first; the last one closes
        the devices."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
            server, self._server = self._server, None
            idle = [link for kept in self._idle.values() for link in kept]
            self._idle.clear()
        if server is not None:
            server.close()
        for link in idle:
            _close(link)
        self._end()

    def _connect(self, key: Key, deadline: float) -> Link:
        host, port, num_nics = key
        return Link(
            *((host, port), num_nics, self._secret, self._devices, self._settings),
            *(self._make_copies, deadline),
        )

    def _take(self, key: Key) -> Link | None:
        """An idle one whose producer is still there."""
        while True:
            with self._lock:
                kept = self._idle.get(key)
                link = kept.pop() if kept else None
                if kept is not None and not kept:
                    del self._idle[key]
            if link is None or link.is_open:
                return link
            _close(link)

    def _keep(self, key: Key, link: Link) -> None:
        with self._lock:
            if not self._closed and len(self._idle[key]) < _IDLE_KEPT:
                self._idle[key].append(link)
                return
        _close(link)

    def _check_open(self) -> None:
        if self._closed:
            raise KVUsageError("the transport was closed")

    def _begin(self) -> None:
        with self._lock:
            self._check_open()
            self._users += 1

    def _end(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            close_each([*self._devices, self._targets])


def _close(link: Link) -> None:
    try:
        link.close()
    except Exception:
        logger.warning("a connection's end", exc_info=True)


def _count(address: Address) -> int:
    """How many NICs the producer has. Raises BadDescriptor."""
    nics = address.get("nics")
    if not isinstance(nics, list) or not 1 <= len(nics) <= _MOST_NICS:
        raise BadDescriptor("an address without NICs")
    if not all(isinstance(nic, str) for nic in nics):
        raise BadDescriptor("an address without NICs")
    return len(nics)
