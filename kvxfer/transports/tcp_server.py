"""The end of `tcp` that has the KV: one thread for each connected reader, inside the engine.

A thread waits in the kernel nearly all of its life; a read costs it one system call for up to 1,024
runs of blocks, straight from the region and without the interpreter's lock. Generations are looked
at after the last byte was handed to the kernel: what the reader gets is then older than any reuse.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from kvxfer.errors import PeerLost, TransportError
from kvxfer.region import Region
from kvxfer.transports import wire

REQUEST = struct.Struct("!16sI")
RUN = struct.Struct("!II")
STATUS_BYTES = 64
"""A cache line: a shorter one misaligns the kernel's copies, and they take twice as long."""
OK, REVOKED, BAD = (letter.ljust(STATUS_BYTES, b"\0") for letter in (b"k", b"r", b"b"))
NO_EPOCH = 2**64 - 1
"""In an epoch's place: revoked while it was read."""
_MOST_RUNS = 1 << 20
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
            while self._answer(sock, *_request(sock, self._patience_s)):
                pass
        except (OSError, TransportError, ValueError):
            pass
        finally:
            with self._lock:
                self._peers.discard(sock)
                sock.close()

    def _answer(self, sock: socket.socket, region_id: bytes, asked: list[tuple[int, int]]) -> bool:
        """False: refused; the connection ends, which tells the reader not to wait for more."""
        region = self._regions.get(region_id.decode("ascii"))
        if region is None or not region.open:
            sock.sendall(REVOKED)
            return False
        if any(first + count > region.num_blocks for first, count in asked):
            sock.sendall(BAD)
            return False
        size, buffer = region.block_bytes, region.buffer
        pieces = [buffer[first * size : (first + count) * size] for first, count in asked]
        wire.send(sock, [memoryview(OK), *pieces], more=True)
        stamps = region.stamps([b for first, count in asked for b in range(first, first + count)])
        numbers = [region.epoch if region.open else NO_EPOCH, *stamps]
        wire.send(sock, [memoryview(struct.pack(f"!{len(numbers)}Q", *numbers))])
        return True


def _request(sock: socket.socket, patience_s: float) -> tuple[bytes, list[tuple[int, int]]]:
    """The next one: region's id and runs. Waits without end for its first byte alone."""
    head = sock.recv(_MOST_AT_ONCE)
    if not head:
        raise PeerLost("the reader left")
    deadline = time.monotonic() + patience_s
    if len(head) < REQUEST.size:
        head += _more(sock, REQUEST.size - len(head), deadline)
    region_id, num_runs = REQUEST.unpack_from(head)
    if num_runs > _MOST_RUNS:
        raise ValueError("too many runs")
    missing = REQUEST.size + num_runs * RUN.size - len(head)
    if missing < 0:
        raise ValueError("a request before the last was answered")
    if missing:
        head += _more(sock, missing, deadline)
    return region_id, list(RUN.iter_unpack(memoryview(head)[REQUEST.size :]))


def _more(sock: socket.socket, size: int, deadline: float) -> bytes:
    found = wire.receive_exactly(sock, size, deadline)
    wire.limit(sock, socket.SO_RCVTIMEO, 0)
    return found
