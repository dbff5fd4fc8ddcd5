"""The end of `tcp` that has the KV: one thread for each connected reader, inside the engine.

A thread waits in the kernel nearly all of its life; a read costs it one system call for up to 1,024
pieces, straight from the region and without the interpreter's lock. Epoch and generations are sent
from where they lie, after the blocks: what the reader gets of those is then older than any reuse.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
import struct
import threading
import time
from typing import NamedTuple

from kvxfer.errors import PeerLost, TransportError
from kvxfer.region import Region
from kvxfer.transports import wire
from kvxfer.transports.bounce import Bounces

logger = logging.getLogger(__name__)

REQUEST = struct.Struct("!16sII")
"""Region's id, numbers of pieces and of blocks"""
PIECE = struct.Struct("!QQ")
"""First byte, bytes"""
BLOCK = struct.Struct("!I")
STATUS_BYTES = 64
"""A cache line: a shorter one misaligns the kernel's copies, and they take twice as long."""
OK, REVOKED, BAD = (letter.ljust(STATUS_BYTES, b"\0") for letter in (b"k", b"r", b"b"))
_IN_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether this processor loads in the order of the program: then one call copies blocks and, after
them, their generations. Else the generations have a call of their own."""
_MOST_PIECES = 1 << 20
_HANDSHAKE_S = 10.0
_MOST_AT_ONCE = 16384


class TcpServer:
    """Serves regions to readers that know the secret, from construction until `close`.

    A reader that neither takes a byte nor completes what it began to say within `patience_s` loses
    its connection; one that asks for nothing keeps it.
    """

    def __init__(self, listen: tuple[str, int], secret: bytes, patience_s: float) -> None:
        self._secret, self._patience_s = secret, patience_s
        self._regions: dict[str, Region] = {}
        self._bounces = Bounces()
        self._peers: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(listen, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="kvxfer-tcp", daemon=True)
        self._thread.start()

    def add(self, region: Region) -> None:
        """Readers may have it from now on, until it is revoked."""
        self._regions[region.id] = region

    def close(self) -> None:
        """Stop listening and drop every reader. Idempotent."""
        with self._lock:
            self._closed = True
            sockets = [self._listener, *self._peers]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its thread wakes and closes it
        self._thread.join()
        self._bounces.close()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    if self._closed:
                        return
                    time.sleep(0.1)  # out of descriptors: readers wait in the backlog meanwhile
                    continue
                with self._lock:
                    if self._closed:
                        sock.close()
                        return
                    self._peers.add(sock)
                threading.Thread(
                    target=self._serve, args=(sock,), name="kvxfer-tcp-peer", daemon=True
                ).start()

    def _serve(self, sock: socket.socket) -> None:
        """One reader, until it leaves. One that misbehaves loses its connection, nothing else."""
        handshake_s = min(_HANDSHAKE_S, self._patience_s)
        try:
            wire.prepare(sock)
            if not wire.admit(sock, self._secret, time.monotonic() + handshake_s):
                return
            wire.limit(sock, socket.SO_SNDTIMEO, self._patience_s)
            wire.limit(sock, socket.SO_RCVTIMEO, 0)
            while self._answer(sock, _request(sock, self._patience_s)):
                pass
        except (OSError, TransportError, ValueError):
            pass
        finally:
            with self._lock:
                self._peers.discard(sock)
                sock.close()

    def _answer(self, sock: socket.socket, asked: Request) -> bool:
        """False: refused; the connection ends, which tells the reader not to wait for more."""
        region = self._regions.get(asked.region)
        if region is None or not region.open:
            sock.sendall(REVOKED)
            return False
        end = max((first + size for first, size in asked.pieces), default=0)
        if end > region.num_bytes or max(asked.blocks, default=-1) >= region.num_blocks:
            sock.sendall(BAD)
            return False
        proof = region.proof(asked.blocks)
        if region.device == "cpu":
            buffer = region.buffer
            views = [memoryview(OK), *(buffer[at : at + size] for at, size in asked.pieces)]
            if _IN_ORDER:
                wire.send(sock, views + proof)
                return True
            wire.send(sock, views, more=True)
        else:
            self._send_from_device(sock, region, asked.pieces)
        wire.send(sock, proof)
        return True

    def _send_from_device(
        self, sock: socket.socket, region: Region, pieces: list[tuple[int, int]]
    ) -> None:
        wire.send(sock, [memoryview(OK)], more=True)
        try:
            with self._bounces.use(region) as bounce:
                for view in bounce.to_host(pieces):
                    wire.send(sock, [view], more=True)
        except TransportError as error:
            logger.warning("region %s cannot be read from %s: %s", region.id, region.device, error)
            raise


class Request(NamedTuple):
    """What a reader wants."""

    region: str
    pieces: list[tuple[int, int]]
    """(first byte, bytes), from the region's block 0"""
    blocks: list[int]
    """Whose generations it wants"""


def _request(sock: socket.socket, patience_s: float) -> Request:
    """The next one. Waits without end for its first byte alone."""
    head = sock.recv(_MOST_AT_ONCE)
    if not head:
        raise PeerLost("the reader left")
    deadline = time.monotonic() + patience_s
    if len(head) < REQUEST.size:
        head += _more(sock, REQUEST.size - len(head), deadline)
    region_id, num_pieces, num_blocks = REQUEST.unpack_from(head)
    if max(num_pieces, num_blocks) > _MOST_PIECES:
        raise ValueError("too many pieces")
    size = REQUEST.size + num_pieces * PIECE.size + num_blocks * BLOCK.size
    if len(head) > size:
        raise ValueError("a request before the last was answered")
    if len(head) < size:
        head += _more(sock, size - len(head), deadline)
    rest = memoryview(head)[REQUEST.size :]
    at = num_pieces * PIECE.size
    blocks = struct.unpack(f"!{num_blocks}I", rest[at:])
    return Request(region_id.decode("ascii"), list(PIECE.iter_unpack(rest[:at])), list(blocks))


def _more(sock: socket.socket, size: int, deadline: float) -> bytes:
    found = wire.receive_exactly(sock, size, deadline)
    wire.limit(sock, socket.SO_RCVTIMEO, 0)
    return found
