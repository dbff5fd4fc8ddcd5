"""What both ends of `tcp` do alike: waiting under a deadline, whole messages, the handshake.

    server:  magic, challenge of 32 bytes
    reader:  its proof, its own challenge
    server:  one byte for yes or no; the server's proof

A proof is HMAC-SHA256 under the cluster's secret over who proves and both challenges, so that
neither can be replayed nor turned back at its maker. The secret never travels.

Sockets block; the kernel counts the time (SO_RCVTIMEO, SO_SNDTIMEO). So one call moves as much as
it may, with the interpreter's lock let go, instead of one call for each piece that arrives.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Sequence

from kvxfer.errors import AccessDenied, PeerLost

MAGIC = b"KVX4"
CHALLENGE_BYTES = 32
MOST_PIECES = 1024
"""Of one system call: IOV_MAX."""
_YES, _NO = b"y", b"n"
_GREETING_BYTES = len(MAGIC) + CHALLENGE_BYTES
_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_UNANSWERED_MS = 60_000


def prepare(sock: socket.socket) -> None:
    """No delay, and a peer that vanished without a word is noticed in about a minute."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)


def left(deadline: float) -> float:
    """Seconds until `deadline` (monotonic). Raises TimeoutError when there are none."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("out of time")
    return left_s


def limit(sock: socket.socket, which: int, seconds: float) -> None:
    """No call waits longer; `which` is SO_RCVTIMEO or SO_SNDTIMEO, 0 seconds are without end."""
    whole, part = divmod(round(seconds * 1e6), 1_000_000)
    if seconds and not whole:
        part = max(part, 1000)
    sock.setsockopt(socket.SOL_SOCKET, which, _TIMEVAL.pack(whole, part))


def receive(sock: socket.socket, views: Sequence[memoryview], deadline: float | None) -> None:
    """Fill all of `views`, in order. Raises TimeoutError, PeerLost when the peer closed.

    Without a deadline it waits as long as `limit` said last.
    """
    todo = [view for view in views if len(view)]
    while todo:
        if deadline is not None:
            limit(sock, socket.SO_RCVTIMEO, left(deadline))
        try:
            count = sock.recvmsg_into(todo[:MOST_PIECES], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            if deadline is None:
                raise TimeoutError("the peer sent nothing") from error
            continue  # the deadline is looked at above
        if not count:
            raise PeerLost("the peer closed the connection")
        todo = rest(todo, count)


def receive_exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    """See `receive`."""
    buffer = bytearray(size)
    receive(sock, [memoryview(buffer)], deadline)
    return bytes(buffer)


def send(sock: socket.socket, views: Sequence[memoryview], more: bool = False) -> None:
    """Send all of `views`, in order; with `more`, what fills no packet waits for the next call.

    Raises TimeoutError if the peer takes nothing for as long as `limit` said last.
    """
    todo = [view for view in views if len(view)]
    while todo:
        flags = socket.MSG_MORE if more or len(todo) > MOST_PIECES else 0
        try:
            count = sock.sendmsg(todo[:MOST_PIECES], (), flags)
        except BlockingIOError as error:
            raise TimeoutError("the peer takes nothing") from error
        todo = rest(todo, count)


def rest(views: list[memoryview], count: int) -> list[memoryview]:
    """`views` without their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def admit(sock: socket.socket, secret: bytes, deadline: float) -> bool:
    """The server's end of the handshake: whether the reader knows the secret."""
    ours = secrets.token_bytes(CHALLENGE_BYTES)
    sock.sendall(MAGIC + ours)
    answer = receive_exactly(sock, 2 * CHALLENGE_BYTES, deadline)
    proof, theirs = answer[:CHALLENGE_BYTES], answer[CHALLENGE_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"reader", ours, theirs)):
        sock.sendall(_NO + bytes(CHALLENGE_BYTES))
        return False
    sock.sendall(_YES + _proof(secret, b"server", ours, theirs))
    return True


def introduce(sock: socket.socket, secret: bytes, deadline: float) -> None:
    """The reader's end. Raises AccessDenied, PeerLost where something else listens."""
    greeting = receive_exactly(sock, _GREETING_BYTES, deadline)
    if not greeting.startswith(MAGIC):
        raise PeerLost("something else listens there")
    theirs = greeting[len(MAGIC) :]
    ours = secrets.token_bytes(CHALLENGE_BYTES)
    sock.sendall(_proof(secret, b"reader", theirs, ours) + ours)
    answer = receive_exactly(sock, 1 + CHALLENGE_BYTES, deadline)
    if answer[:1] != _YES:
        raise AccessDenied("the peer refused our secret")
    if not hmac.compare_digest(answer[1:], _proof(secret, b"server", theirs, ours)):
        raise AccessDenied("the peer does not know our secret")


def _proof(secret: bytes, who: bytes, server: bytes, reader: bytes) -> bytes:
    return hmac.new(secret, who + server + reader, hashlib.sha256).digest()
