"""Frames of msgpack over a Unix socket pair, between a worker's main process and its engine.

A frame is 4 bytes of length (big-endian) and msgpack of one message. Both ends are a
`Channel`; the main process reads `Event`s from its end, the engine reads `Command`s.

Contract: any thread may send (frames never interleave), one thread at a time receives.
While a send waits for the peer to read, what the peer sent meanwhile is taken in, so two
peers that send to each other at once never block each other for good. A peer that is gone
raises `ChannelClosed` from either side; nothing is delivered in part.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec

from pdbatch.engine.messages import Command, Event
from pdbatch.errors import EngineDied

_READ_BYTES = 1 << 18
_HEADER_BYTES = 4
_READ = select.POLLIN
_WRITE = select.POLLOUT

Message = TypeVar("Message")
First = TypeVar("First")


class ChannelClosed(EngineDied):
    """The peer closed its end or its process ended."""


class Channel(Generic[Message]):
    """One end of the pair; `incoming` is the type (or union) of the messages it reads.

    The channel owns the socket from now on.
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(incoming)
        self._buffer = bytearray()
        self._ready: deque[bytes] = deque()
        """Whole frames, not decoded yet."""
        self._ended = False
        self._send_lock = threading.Lock()
        self._receive_lock = threading.RLock()

    def fileno(self) -> int:
        """For select: readable when a message, or the end, may have come."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Send one message; returns when the kernel has all of it. Raises ChannelClosed."""
        frame = bytearray(_HEADER_BYTES)
        self._encoder.encode_into(message, frame, _HEADER_BYTES)
        frame[:_HEADER_BYTES] = (len(frame) - _HEADER_BYTES).to_bytes(_HEADER_BYTES, "big")
        with self._send_lock, memoryview(frame) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self._socket.send(view[sent:])
                except BlockingIOError:
                    self._wait_writable()
                except OSError as error:
                    raise ChannelClosed(f"the other process is gone: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None if there was none for `timeout_s`. Raises ChannelClosed.

        Messages that came before the end are delivered before the end is raised.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._receive_lock:
            while not self._ready:
                if self._ended:
                    raise ChannelClosed("the other process closed the channel")
                left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not _wait(self._socket, _READ, left_s):
                    return None
                self._fill()
            return self._decoder.decode(self._ready.popleft())

    def receive_as(self, kind: type[First]) -> First:
        """The next message, of another type than the rest; waits. Raises ChannelClosed."""
        with self._receive_lock:
            while not self._ready:
                if self._ended:
                    raise ChannelClosed("the other process closed the channel")
                _wait(self._socket, _READ, None)
                self._fill()
            return msgspec.msgpack.decode(self._ready.popleft(), type=kind)

    def receive_all(self) -> list[Message]:
        """Every message that has come, without waiting. Raises ChannelClosed if none and ended."""
        with self._receive_lock:
            self._fill()
            messages = [self._decoder.decode(frame) for frame in self._ready]
            self._ready.clear()
            if not messages and self._ended:
                raise ChannelClosed("the other process closed the channel")
            return messages

    @property
    def pending(self) -> bool:
        """True if a message is here that was taken in during a send; select does not see it."""
        return bool(self._ready)

    def close(self) -> None:
        """Close this end; the peer's next receive raises. Idempotent.

        A thread that waits in `receive` wakes with ChannelClosed.
        """
        self._ended = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._receive_lock:
            self._socket.close()

    def _wait_writable(self) -> None:
        """Wait for room in the kernel; take in what comes, unless another thread receives."""
        if not self._receive_lock.acquire(blocking=False):
            _wait(self._socket, _WRITE, 0.05)
            return
        try:
            if self._ended:
                _wait(self._socket, _WRITE, 0.05)
            elif _wait(self._socket, _READ | _WRITE, 0.05) & _READ:
                self._fill()
        finally:
            self._receive_lock.release()

    def _fill(self) -> None:
        """Read what the kernel has and cut it into messages."""
        while not self._ended:
            try:
                piece = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                self._ended = True
            self._buffer += piece
            if len(piece) < _READ_BYTES:
                break
        self._cut()

    def _cut(self) -> None:
        start, size = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while size - start >= _HEADER_BYTES:
                body = start + _HEADER_BYTES
                end = body + int.from_bytes(view[start:body], "big")
                if end > size:
                    break
                self._ready.append(bytes(view[body:end]))
                start = end
        del self._buffer[:start]


def _wait(sock: socket.socket, events: int, timeout_s: float | None) -> int:
    """Which of the events are there; an end or an error counts as readable. 0 if none in time."""
    poll = select.poll()
    poll.register(sock, events)
    found = poll.poll(None if timeout_s is None else timeout_s * 1000)
    seen = found[0][1] if found else 0
    return seen | _READ if seen & ~_WRITE else seen


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets; one becomes the main's `Channel`, the other goes to the engine."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def main_end(sock: socket.socket) -> Channel[Event]:
    """The main process's end: sends commands, reads events."""
    return Channel(sock, Event)


def engine_end(sock: socket.socket) -> Channel[Command]:
    """The engine's end: sends events, reads commands."""
    return Channel(sock, Command)
