"""The control connection: where peers say what only those who know the cluster's secret may hear.

Transports whose reads pass by the producer's processor (RDMA, CUDA IPC) hand out keys and handles
over it. After the handshake of `kvxfer.transports.wire` a reader asks and the producer answers,
one at a time:

    length, 4 bytes; then JSON

A session ends with its connection, however that ends; what was made for it (a queue pair, a ring)
ends with it: that is what `Session.closers` are for. Messages are never logged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from kvxfer import errors
from kvxfer.errors import BadDescriptor, KVTransferError, PeerLost, TransferTimeout
from kvxfer.transports import wire

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Answer = Callable[["Session", Message], Message]
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 16 << 20
_HANDSHAKE_S = 10.0
_PATIENCE_S = 60.0


class Session:
    """One reader, from its handshake to the end of its connection."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.closers: list[Callable[[], None]] = []
        """Called once, last first, when the session ends."""

    def end(self) -> None:
        """Run the closers; what one of them raises keeps no other from running."""
        while self.closers:
            try:
                self.closers.pop()()
            except Exception:
                logger.exception("the end of a session with %s", self.peer)


class ControlServer:
    """Answers readers, each on a thread of its own, from construction until `close`.

    `answer` runs on those threads; a KVTransferError that it raises travels to the reader and is
    raised there, the session goes on. `name` is that of the threads. Raises OSError where it
    cannot listen.
    """

    def __init__(self, listen: tuple[str, int], secret: bytes, answer: Answer, name: str) -> None:
        self._secret, self._answer, self._name = secret, answer, name
        self._peers: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(listen, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end every session. Idempotent; not for sessions' own threads."""
        with self._lock:
            self._closed = True
            sockets, threads = [self._listener, *self._peers], list(self._peers.values())
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its thread wakes and closes it
        for thread in [self._thread, *threads]:
            thread.join()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    sock, (host, *_) = self._listener.accept()
                except OSError:
                    if self._closed:
                        return
                    time.sleep(0.1)  # out of descriptors: readers wait in the backlog meanwhile
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(sock, host), name=f"{self._name}-peer", daemon=True
                )
                with self._lock:
                    if self._closed:
                        sock.close()
                        return
                    self._peers[sock] = thread
                thread.start()

    def _serve(self, sock: socket.socket, host: str) -> None:
        session = Session(host)
        try:
            wire.prepare(sock)
            if not wire.admit(sock, self._secret, time.monotonic() + _HANDSHAKE_S):
                return
            wire.limit(sock, socket.SO_SNDTIMEO, _PATIENCE_S)
            while True:
                wire.limit(sock, socket.SO_RCVTIMEO, 0)
                request = _receive(sock, None)
                _send(sock, self._reply(session, request))
        except (OSError, KVTransferError, ValueError):
            pass
        finally:
            session.end()
            with self._lock:
                self._peers.pop(sock, None)
                sock.close()

    def _reply(self, session: Session, request: Message) -> Message:
        try:
            return {"ok": self._answer(session, request)}
        except KVTransferError as error:
            return {"error": type(error).__name__, "message": str(error), "errno": error.errno}
        except (KeyError, TypeError) as error:
            return {"error": "BadDescriptor", "message": f"a request without {error}"}


class ControlClient:
    """The reader's end. Connects at once; one question at a time, others wait for their turn.

    Raises AccessDenied, PeerLost, TransferTimeout.
    """

    def __init__(self, where: tuple[str, int], secret: bytes, timeout_s: float) -> None:
        self._where = where
        self._lock = threading.Lock()
        deadline = time.monotonic() + timeout_s
        sock = None
        try:
            sock = socket.create_connection(where, timeout=timeout_s)
            wire.prepare(sock)
            wire.introduce(sock, secret, deadline)
        except BaseException as error:
            if sock is not None:
                sock.close()
            raise self._told(error, timeout_s) from error
        self._sock: socket.socket | None = sock

    def ask(self, request: Message, timeout_s: float) -> Message:
        """The answer. Raises what the server named, AccessDenied, PeerLost, TransferTimeout; the
        latter two close the connection."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if self._sock is None:
                raise PeerLost(f"{self._where[0]}: the connection was closed")
            try:
                wire.limit(self._sock, socket.SO_SNDTIMEO, wire.left(deadline))
                _send(self._sock, request)
                found = _receive(self._sock, deadline)
            except BaseException as error:
                self._sock.close()
                self._sock = None
                raise self._told(error, timeout_s) from error
        if "ok" in found:
            return dict(found["ok"])
        kind = getattr(errors, str(found.get("error")), None)
        if not (isinstance(kind, type) and issubclass(kind, KVTransferError)):
            kind = PeerLost
        raise kind(str(found.get("message")), errno=found.get("errno"))

    @property
    def is_open(self) -> bool:
        """Whether the connection is there: nothing closed it, and nothing waits in it."""
        with self._lock:
            if self._sock is None:
                return False
            try:
                self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            return False

    def close(self) -> None:
        """The session ends. Idempotent."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    def _told(self, error: BaseException, timeout_s: float) -> BaseException:
        """The error as a kind of ours."""
        host, port = self._where
        if isinstance(error, TimeoutError):
            return TransferTimeout(f"{host} gave no answer in {timeout_s} s", errno=errno.ETIMEDOUT)
        if isinstance(error, socket.gaierror):
            return PeerLost(f"{host}: {error}", errno=errno.EHOSTUNREACH)
        if isinstance(error, OSError):
            return PeerLost(f"{host}: {error}", errno=error.errno)
        if isinstance(error, OverflowError):
            return BadDescriptor(f"port {port}")
        return error


def _send(sock: socket.socket, message: Message) -> None:
    text = json.dumps(message, separators=(",", ":")).encode()
    wire.send(sock, [memoryview(_LENGTH.pack(len(text))), memoryview(text)])


def _receive(sock: socket.socket, deadline: float | None) -> Message:
    """The next message. Raises PeerLost, TimeoutError, ValueError for what is none."""
    (size,) = _LENGTH.unpack(wire.receive_exactly(sock, _LENGTH.size, deadline))
    if size > _MOST_BYTES:
        raise PeerLost(f"a message of {size} bytes")
    try:
        found = json.loads(wire.receive_exactly(sock, size, deadline))
    except ValueError as error:
        raise PeerLost("a message that is no JSON") from error
    if not isinstance(found, dict):
        raise PeerLost("a message that is no object")
    return found
