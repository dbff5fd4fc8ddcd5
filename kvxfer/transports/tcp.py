"""Over a socket, for machines without anything better.

After a handshake in which both ends prove that they know the cluster's secret (HMAC of the other's
random challenge; the secret itself never travels), one connection serves one read at a time:

    reader: region id, number of runs, (first block, blocks) each
    server: status; the blocks' bytes; then epoch and generations, looked at after the last byte
            has left

Bytes go from the region to the socket and from the socket into the destination, without a copy
between. Connections are kept for the next read.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvxfer.errors import AccessDenied, PeerLost, Revoked, TransferTimeout, TransportError
from kvxfer.region import Region, runs
from kvxfer.transports.base import Address, Stamp

_NONCE_BYTES = 32
_REQUEST = struct.Struct("!16sI")
_RUN = struct.Struct("!II")
_OK, _REVOKED, _BAD = b"k", b"r", b"b"
_IDLE_KEPT = 8
_MOST_RUNS = 1 << 20
_SEND_BYTES = 4 << 20
_HANDSHAKE_S = 10.0


class TcpTransport:
    """See the module. Listens on `listen_host` once it serves; the loopback unless told."""

    name = "tcp"

    def __init__(self, secret: str, *, listen_host: str = "127.0.0.1", port: int = 0) -> None:
        self._secret = secret.encode()
        self._listen = (listen_host, port)
        self._regions: dict[str, Region] = {}
        self._server: socket.socket | None = None
        self._served: set[socket.socket] = set()
        self._idle: defaultdict[tuple[str, int], list[socket.socket]] = defaultdict(list)
        self._lock = threading.Lock()

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`."""
        with self._lock:
            self._regions[region.id] = region
            if self._server is None:
                self._server = socket.create_server(self._listen, backlog=64)
                threading.Thread(
                    target=self._accept, args=(self._server,), name="kvxfer-tcp", daemon=True
                ).start()
            host, port = self._server.getsockname()[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return {"host": host, "port": port, "region": region.id}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return bool(address.get("port"))

    def read(
        self,
        address: Address,
        src_blocks: Sequence[int],
        destination: Region,
        dst_blocks: Sequence[int],
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`."""
        where = (str(address["host"]), int(address["port"]))
        deadline = time.monotonic() + timeout_s
        sock = None
        try:
            sock = self._connection(where, deadline)
            stamp = _ask(
                sock, str(address["region"]), src_blocks, destination, dst_blocks, deadline
            )
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"{where[0]} gave no answer in {timeout_s} s") from error
            if isinstance(error, OSError):
                raise PeerLost(f"{where[0]}: {error}", errno=error.errno) from error
            raise
        with self._lock:
            if len(self._idle[where]) < _IDLE_KEPT:
                self._idle[where].append(sock)
                sock = None
        if sock is not None:
            sock.close()
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            sockets = [*self._served, *(s for kept in self._idle.values() for s in kept)]
            if self._server is not None:
                sockets.append(self._server)
            self._server = None
            self._idle.clear()
            self._regions.clear()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    # --- the reader's end

    def _connection(self, where: tuple[str, int], deadline: float) -> socket.socket:
        with self._lock:
            while self._idle[where]:
                sock = self._idle[where].pop()
                if _is_quiet(sock):
                    return sock
                sock.close()
        sock = socket.create_connection(where, timeout=_left(deadline))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _prove_as_reader(sock, self._secret, deadline)
        except BaseException:
            sock.close()
            raise
        return sock

    # --- the server's end

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            with self._lock:
                self._served.add(sock)
            threading.Thread(
                target=self._serve, args=(sock,), name="kvxfer-tcp-peer", daemon=True
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        """One peer, until it leaves. A peer that misbehaves loses its connection, nothing else."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(_HANDSHAKE_S)
            if not _prove_as_server(sock, self._secret):
                return
            while True:
                sock.settimeout(None)
                head = _receive_exactly(sock, _REQUEST.size)
                sock.settimeout(60.0)
                self._answer(sock, *_REQUEST.unpack(head))
        except (OSError, TransportError, ValueError):
            pass
        finally:
            with self._lock:
                self._served.discard(sock)
            sock.close()

    def _answer(self, sock: socket.socket, region_id: bytes, num_runs: int) -> None:
        if num_runs > _MOST_RUNS:
            raise ValueError("too many runs")
        asked = list(_RUN.iter_unpack(_receive_exactly(sock, num_runs * _RUN.size)))
        region = self._regions.get(region_id.decode("ascii"))
        if region is None or not region.open:
            sock.sendall(_REVOKED)
            return
        if any(first + count > region.num_blocks for first, count in asked):
            sock.sendall(_BAD)
            return
        sock.sendall(_OK)
        size = region.block_bytes
        for first, count in asked:
            piece = region.buffer[first * size : (first + count) * size]
            for start in range(0, len(piece), _SEND_BYTES):
                sock.sendall(piece[start : start + _SEND_BYTES])
        blocks = [block for first, count in asked for block in range(first, first + count)]
        numbers = [region.epoch if region.open else 2**64 - 1, *region.stamps(blocks)]
        sock.sendall(struct.pack(f"!{len(numbers)}Q", *numbers))


def _ask(
    sock: socket.socket,
    region: str,
    src_blocks: Sequence[int],
    destination: Region,
    dst_blocks: Sequence[int],
    deadline: float,
) -> Stamp:
    wanted = runs(src_blocks, dst_blocks)
    head = _REQUEST.pack(region.encode("ascii"), len(wanted))
    sock.settimeout(_left(deadline))
    sock.sendall(head + b"".join(_RUN.pack(src, count) for src, _, count in wanted))
    status = _receive_exactly(sock, 1, deadline)
    if status == _REVOKED:
        raise Revoked("the peer no longer lets that region be read")
    if status != _OK:
        raise PeerLost("the peer has no such blocks")
    size = destination.block_bytes
    for _, dst, count in wanted:
        _receive_into(sock, destination.buffer[dst * size : (dst + count) * size], deadline)
    tail = _receive_exactly(sock, 8 * (1 + len(src_blocks)), deadline)
    epoch, *generations = struct.unpack(f"!{1 + len(src_blocks)}Q", tail)
    return Stamp(epoch, generations)


def _prove_as_server(sock: socket.socket, secret: bytes) -> bool:
    mine = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(mine)
    answer = _receive_exactly(sock, 2 * _NONCE_BYTES)
    proof, theirs = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"reader", mine)):
        return False
    sock.sendall(_proof(secret, b"server", theirs))
    return True


def _prove_as_reader(sock: socket.socket, secret: bytes, deadline: float) -> None:
    theirs = _receive_exactly(sock, _NONCE_BYTES, deadline)
    mine = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_proof(secret, b"reader", theirs) + mine)
    try:
        proof = _receive_exactly(sock, _NONCE_BYTES, deadline)
    except (ConnectionError, PeerLost) as error:
        raise AccessDenied("the peer refused our secret") from error
    if not hmac.compare_digest(proof, _proof(secret, b"server", mine)):
        raise AccessDenied("the peer does not know our secret")


def _proof(secret: bytes, who: bytes, challenge: bytes) -> bytes:
    return hmac.new(secret, who + challenge, hashlib.sha256).digest()


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("out of time")
    return left_s


def _receive_exactly(sock: socket.socket, size: int, deadline: float | None = None) -> bytes:
    buffer = bytearray(size)
    _receive_into(sock, memoryview(buffer), deadline)
    return bytes(buffer)


def _receive_into(sock: socket.socket, view: memoryview, deadline: float | None) -> None:
    while len(view):
        if deadline is not None:
            sock.settimeout(_left(deadline))
        count = sock.recv_into(view, 0, socket.MSG_WAITALL if deadline is None else 0)
        if not count:
            raise PeerLost("the peer closed the connection")
        view = view[count:]


def _is_quiet(sock: socket.socket) -> bool:
    """Whether an idle connection is still there: no end and no byte waits in it."""
    try:
        sock.settimeout(0)
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


__all__ = ["TcpTransport"]
