"""A proxy between reader and server that does to a connection what networks do. Shipped for tests.

    with Proxy("127.0.0.1", port) as proxy:
        proxy.fault = NetFault("cut", after_bytes=1000)
        ...  # read from proxy.port instead

It knows no protocol, so it serves every transport over TCP. A fault acts on what the server sends,
counted from the beginning of each connection made after the fault was set.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_CHUNK_BYTES = 1 << 16
_LOOK_S = 0.2
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(frozen=True, slots=True)
class NetFault:
    """What happens after `after_bytes` bytes came from the server."""

    kind: Literal["cut", "stall", "trickle"]
    """cut: the reader's connection is reset. stall: nothing more comes, nothing ends. trickle: one
    byte every `every_s` seconds, so that no single wait is ever long."""
    after_bytes: int
    every_s: float = 0.02


class Proxy:
    """Listens on the loopback from `with` to its end. `fault` may be changed at any time."""

    def __init__(self, host: str, port: int) -> None:
        self.fault: NetFault | None = None
        self.num_bytes = 0
        """That came from the server so far, over all connections."""
        self._target = (host, port)
        self._over = threading.Event()
        self._drops = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join(10)
        self._server.close()

    def drop(self) -> None:
        """End all connections of now; returns when they have ended."""
        self._drops += 1
        for thread in self._threads[1:]:
            thread.join(10)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                reader, _ = self._server.accept()
            except OSError:
                return
            self._start(self._connection, reader, self.fault)

    def _connection(self, reader: socket.socket, fault: NetFault | None) -> None:
        with (
            contextlib.suppress(OSError),
            reader,
            socket.create_connection(self._target) as server,
        ):
            self._carry(reader, server, fault)

    def _carry(self, reader: socket.socket, server: socket.socket, fault: NetFault | None) -> None:
        left, drops = fault.after_bytes if fault else 0, self._drops
        while not self._over.is_set() and drops == self._drops:
            ready, _, _ = select.select([reader, server], [], [], _LOOK_S)
            if reader in ready:
                if not (data := reader.recv(_CHUNK_BYTES)):
                    return
                server.sendall(data)
            if server in ready:
                if not (data := server.recv(_CHUNK_BYTES)):
                    return
                self.num_bytes += len(data)
                if fault is not None and len(data) > left:
                    reader.sendall(data[:left])
                    self._break(fault, reader, data[left:])
                    return
                reader.sendall(data)
                left -= len(data)

    def _break(self, fault: NetFault, reader: socket.socket, rest: bytes) -> None:
        """Ends with the reader's patience, or its connection."""
        if fault.kind == "cut":
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            return
        for byte in rest if fault.kind == "trickle" else b"":
            reader.sendall(bytes([byte]))
            if self._over.wait(fault.every_s):
                return
        while not self._over.is_set():
            if select.select([reader], [], [], _LOOK_S)[0] and not reader.recv(_CHUNK_BYTES):
                return
