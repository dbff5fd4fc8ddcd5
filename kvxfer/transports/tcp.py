"""Over a socket, for machines without anything better.

After the handshake (`wire`) one connection serves one read at a time:

    reader: region id, numbers of pieces and of blocks; (first byte, bytes) of each piece; blocks
    server: status; the blocks' bytes; then epoch and generations, looked at after the last byte
            has left. Or a status that refuses, and the end of the connection

Bytes go from the region to the socket and from the socket into the destination, without a copy
between; where an end lies on a device, through a ring of page-locked memory there (`bounce`).
Connections are kept for the next read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any

from kvxfer.errors import BadDescriptor, KVUsageError, PeerLost, Revoked, TransferTimeout
from kvxfer.plan import ReadPlan
from kvxfer.region import Region
from kvxfer.transports import wire
from kvxfer.transports.base import Address, Stamp, number, text
from kvxfer.transports.bounce import Bounces
from kvxfer.transports.tcp_server import (
    BAD,
    NO_EPOCH,
    PIECE,
    REQUEST,
    REVOKED,
    STATUS_BYTES,
    TcpServer,
)

_IDLE_KEPT = 8
_NEVER_BLOCKS_BYTES = 16384  # an idle connection takes so much at once


class TcpTransport:
    """See the module. Listens on `listen_host` once it serves; the loopback unless told.

    `patience_s`: how long a reader that stalls in the middle of a read may hold its connection and
    the thread that serves it. Raises KVUsageError unless it is above 0.
    """

    name = "tcp"

    def __init__(
        self,
        secret: str,
        *,
        listen_host: str = "127.0.0.1",
        port: int = 0,
        patience_s: float = 60.0,
    ) -> None:
        if patience_s <= 0:
            raise KVUsageError(f"a patience of {patience_s} s")
        self._secret, self._patience_s = secret.encode(), patience_s
        self._listen = (listen_host, port)
        self._server: TcpServer | None = None
        self._idle: defaultdict[tuple[str, int], list[socket.socket]] = defaultdict(list)
        self._bounces = Bounces()
        self._closes = 0
        self._lock = threading.Lock()

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`. Raises OSError where it cannot listen."""
        with self._lock:
            if self._server is None:
                self._server = TcpServer(self._listen, self._secret, self._patience_s)
            self._server.add(region)
            host, port = self._server.address
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return {"host": host, "port": port, "region": region.id}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return bool(address.get("port"))

    def read(
        self,
        address: Address,
        plan: ReadPlan,
        destination: Region,
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`."""
        where = (text(address, "host"), number(address, "port"))
        request, pieces = _request(text(address, "region"), plan)
        deadline = time.monotonic() + timeout_s
        sock = None
        closes = self._closes
        try:
            sock = self._connection(where, deadline)
            if destination.device == "cpu":
                views = [destination.buffer[dst : dst + size] for dst, size in pieces]
                stamp = _ask(sock, request, views, len(plan.src_blocks), deadline)
            else:
                with self._bounces.use(destination) as bounce:
                    room = bounce.to_device(pieces)
                    stamp = _ask(sock, request, room, len(plan.src_blocks), deadline)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"{where[0]} gave no answer in {timeout_s} s") from error
            if isinstance(error, OSError):
                raise PeerLost(f"{where[0]}: {error}", errno=error.errno) from error
            if isinstance(error, OverflowError):
                raise BadDescriptor(f"port {where[1]}") from error
            raise
        self._keep(where, sock, closes)
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            server, self._server = self._server, None
            idle = [sock for kept in self._idle.values() for sock in kept]
            self._idle.clear()
            self._closes += 1
        for sock in idle:
            sock.close()
        if server is not None:
            server.close()
        self._bounces.close()

    def _connection(self, where: tuple[str, int], deadline: float) -> socket.socket:
        while True:
            with self._lock:
                kept = self._idle.get(where)
                sock = kept.pop() if kept else None
                if kept is not None and not kept:
                    del self._idle[where]
            if sock is None:
                break
            if _is_quiet(sock):
                return sock
            sock.close()
        sock = socket.create_connection(where, timeout=wire.left(deadline))
        try:
            wire.prepare(sock)
            wire.introduce(sock, self._secret, deadline)
        except BaseException:
            sock.close()
            raise
        return sock

    def _keep(self, where: tuple[str, int], sock: socket.socket, closes: int) -> None:
        """For the next read, unless the transport was closed meanwhile or there are enough."""
        with self._lock:
            if closes == self._closes and len(self._idle[where]) < _IDLE_KEPT:
                self._idle[where].append(sock)
                return
        sock.close()


def _request(region: str, plan: ReadPlan) -> tuple[bytes, list[tuple[int, int]]]:
    """What to ask, and the (first byte, bytes) where the answer's bytes go, in order.

    Raises BadDescriptor.
    """
    wanted, blocks = plan.pieces(), plan.src_blocks
    try:
        parts = [REQUEST.pack(region.encode("ascii"), len(wanted), len(blocks))]
        parts += [PIECE.pack(src, num_bytes) for src, _, num_bytes in wanted]
        parts.append(struct.pack(f"!{len(blocks)}I", *blocks))
    except (struct.error, UnicodeEncodeError) as error:
        raise BadDescriptor(f"region {region!r}, blocks: {error}") from error
    return b"".join(parts), [(dst, num_bytes) for _, dst, num_bytes in wanted]


def _ask(
    sock: socket.socket,
    request: bytes,
    views: Sequence[memoryview] | Generator[memoryview],
    num_blocks: int,
    deadline: float,
) -> Stamp:
    """`views`: where the blocks' bytes go; from a generator they are asked for one by one."""
    if len(request) > _NEVER_BLOCKS_BYTES:
        wire.limit(sock, socket.SO_SNDTIMEO, wire.left(deadline))
    wire.send(sock, [memoryview(request)])
    status = bytearray(STATUS_BYTES)
    tail = bytearray(8 * (1 + num_blocks))
    try:
        if isinstance(views, Sequence):
            wire.receive(sock, [memoryview(status), *views, memoryview(tail)], deadline)
        else:
            wire.receive(sock, [memoryview(status)], deadline)
            with contextlib.closing(views):
                for view in views:
                    wire.receive(sock, [view], deadline)
            wire.receive(sock, [memoryview(tail)], deadline)
    except PeerLost:
        _refusal(bytes(status))
        raise
    epoch, *generations = struct.unpack(f"!{1 + num_blocks}Q", tail)
    if epoch == NO_EPOCH:
        raise Revoked("the region was revoked during the read")
    return Stamp(epoch, generations)


def _refusal(status: bytes) -> None:
    """A server that refuses says so and closes."""
    if status == REVOKED:
        raise Revoked("the peer no longer lets that region be read")
    if status == BAD:
        raise BadDescriptor("the peer has no such blocks")


def _is_quiet(sock: socket.socket) -> bool:
    """Whether an idle connection is still there: no end and no byte waits in it."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
