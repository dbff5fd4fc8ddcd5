"""Over a socket, for machines without anything better.

After the handshake (`wire`) one connection serves one read at a time:

    reader: region id, numbers of pieces and of blocks; (first byte, bytes) of each piece; blocks
    server: status; the blocks' bytes; then the region's header and the generations as they lie in
            memory, copied after the last byte. Or a status that refuses, and the end of the
            connection

Bytes go from the region to the socket and from the socket into the destination, without a copy
between; where an end lies on a device, through a ring of page-locked memory there (`bounce`).
Connections are kept for the next read.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from kvxfer.errors import BadDescriptor, KVUsageError, PeerLost, Revoked, TransferTimeout
from kvxfer.plan import ReadPlan
from kvxfer.region import HEADER, MAGIC, Region
from kvxfer.transports import wire
from kvxfer.transports.base import Address, Stamp, number, text
from kvxfer.transports.bounce import Bounces
from kvxfer.transports.tcp_server import (
    BAD,
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
        self._idle: defaultdict[tuple[str, int], list[_Line]] = defaultdict(list)
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
        line = None
        closes = self._closes
        try:
            line = self._connection(where, deadline)
            sock = line.sock
            if destination.device == "cpu":
                buffer = destination.buffer
                _send(sock, request, deadline)  # the peer wakes while we cut ours
                views = [buffer[dst : dst + size] for dst, size in pieces]
                stamp = _receive(sock, views, len(plan.src_blocks), deadline)
            else:
                with self._bounces.use(destination) as bounce:
                    room = bounce.to_device(pieces)
                    _send(sock, request, deadline)
                    stamp = _receive(sock, room, len(plan.src_blocks), deadline)
        except BaseException as error:
            if line is not None:
                line.sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"{where[0]} gave no answer in {timeout_s} s") from error
            if isinstance(error, OSError):
                raise PeerLost(f"{where[0]}: {error}", errno=error.errno) from error
            if isinstance(error, OverflowError):
                raise BadDescriptor(f"port {where[1]}") from error
            raise
        self._keep(where, line, closes)
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            server, self._server = self._server, None
            idle = [line.sock for kept in self._idle.values() for line in kept]
            self._idle.clear()
            self._closes += 1
        for sock in idle:
            sock.close()
        if server is not None:
            server.close()
        self._bounces.close()

    def _connection(self, where: tuple[str, int], deadline: float) -> _Line:
        while True:
            with self._lock:
                kept = self._idle.get(where)
                line = kept.pop() if kept else None
                if kept is not None and not kept:
                    del self._idle[where]
            if line is None:
                break
            if not line.poll.poll(0):
                return line
            line.sock.close()  # the peer ended it, or says what nobody asked for
        sock = socket.create_connection(where, timeout=wire.left(deadline))
        try:
            wire.prepare(sock)
            wire.introduce(sock, self._secret, deadline)
        except BaseException:
            sock.close()
            raise
        line = _Line(sock, select.poll())
        line.poll.register(sock, select.POLLIN)
        return line

    def _keep(self, where: tuple[str, int], line: _Line, closes: int) -> None:
        """For the next read, unless the transport was closed meanwhile or there are enough."""
        with self._lock:
            if closes == self._closes and len(self._idle[where]) < _IDLE_KEPT:
                self._idle[where].append(line)
                return
        line.sock.close()


class _Line(NamedTuple):
    """A connection after its handshake."""

    sock: socket.socket
    poll: select.poll
    """Tells whether an idle one is still there: no end and no byte waits in it."""


def _request(region: str, plan: ReadPlan) -> tuple[bytes, list[tuple[int, int]]]:
    """What to ask, and the (first byte, bytes) where the answer's bytes go, in order.

    Raises BadDescriptor.
    """
    wanted, blocks = plan.pieces(), plan.src_blocks
    try:
        request = struct.pack(
            f"{REQUEST.format}{2 * len(wanted)}Q{len(blocks)}I",
            region.encode("ascii"),
            len(wanted),
            len(blocks),
            *(number for src, _, num_bytes in wanted for number in (src, num_bytes)),
            *blocks,
        )
    except (struct.error, UnicodeEncodeError) as error:
        raise BadDescriptor(f"region {region!r}, blocks: {error}") from error
    return request, [(dst, num_bytes) for _, dst, num_bytes in wanted]


def _send(sock: socket.socket, request: bytes, deadline: float) -> None:
    if len(request) > _NEVER_BLOCKS_BYTES:
        wire.limit(sock, socket.SO_SNDTIMEO, wire.left(deadline))
    wire.send(sock, [memoryview(request)])


def _receive(
    sock: socket.socket,
    views: Sequence[memoryview] | Generator[memoryview],
    num_blocks: int,
    deadline: float,
) -> Stamp:
    """`views`: where the blocks' bytes go; from a generator they are asked for one by one."""
    status = bytearray(STATUS_BYTES)
    tail = bytearray(HEADER.size + 8 * num_blocks)
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
    magic, epoch, _, _, is_open, _ = HEADER.unpack_from(tail)
    if magic != MAGIC:
        raise PeerLost("the peer's numbers are in another order of bytes")
    if not is_open:
        raise Revoked("the region was revoked during the read")
    return Stamp(epoch, list(struct.unpack_from(f"={num_blocks}Q", tail, HEADER.size)))


def _refusal(status: bytes) -> None:
    """A server that refuses says so and closes."""
    if status == REVOKED:
        raise Revoked("the peer no longer lets that region be read")
    if status == BAD:
        raise BadDescriptor("the peer has no such blocks")
