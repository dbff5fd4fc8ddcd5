"""The producer's process: a region with pinned tables, and a plain socket that sends on request.

It is told its blocks, tables, device and transports in one line of JSON, says its socket's port and
a descriptor for each table, and goes on until it is killed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from kvxfer.bench.case import Case
from kvxfer.descriptor import KVDescriptor
from kvxfer.opening import open_transport
from kvxfer.producer import KVProducer
from kvxfer.region import Region

HOST, SECRET, LOOPBACK = "bench-host", "bench", "127.0.0.1"
FILL = 7
"""What every byte of a source is."""


class Source:
    """The other process, from `with` to its end."""

    def __init__(self, case: Case, device: str, ways: Sequence[str]) -> None:
        self._case, self._device, self._ways = case, device, list(ways)

    def __enter__(self) -> Source:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kvxfer.bench.source import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        case = self._case
        asked = {
            "block_bytes": case.block_bytes,
            "num_blocks": case.num_blocks,
            "tables": [source for source, _ in case.tables],
            "device": self._device,
            "ways": self._ways,
        }
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        said = [self._process.stdout.readline() for _ in range(1 + len(case.tables))]
        if not said[-1]:
            self.__exit__()
            raise RuntimeError(f"the source of {', '.join(self._ways)} on {self._device} ended")
        self.port = int(said[0])
        self.descriptors = [KVDescriptor.from_json(line) for line in said[1:]]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def make_region(num_blocks: int, block_bytes: int, device: str, fill: int) -> Region:
    """On the host or on a device; every page was touched, as an engine's were."""
    if device == "cpu":
        region = Region(num_blocks, block_bytes)
        region.take(range(num_blocks))
        region.buffer[:] = bytes([fill]) * region.num_bytes
        return region
    from kvxfer.cuda import cuda_region

    found = cuda_region(num_blocks, block_bytes, device)
    found.tensor.fill_(fill)
    _synchronize(device)
    return found


def _synchronize(device: str) -> None:
    import torch

    torch.cuda.synchronize(device)


def serve() -> None:
    """The process's whole life."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    case = Case(asked["block_bytes"], asked["block_bytes"], 1)
    region = make_region(asked["num_blocks"], case.block_bytes, asked["device"], FILL)
    ways = [
        open_transport(name, host=HOST, secret=SECRET, listen_host=LOOPBACK)
        for name in asked["ways"]
    ]
    producer = KVProducer(region, ways, layout=case.layout, producer="p#1", host=HOST, epoch=1)
    data = memoryview(bytes([FILL]) * (region.num_bytes if "tcp" in asked["ways"] else 0))
    with socket.create_server((LOOPBACK, 0)) as server:
        print(server.getsockname()[1], flush=True)
        for turn, table in enumerate(asked["tables"]):
            described = producer.pin(str(turn), table, range(len(table)))
            print(described.to_json().decode(), flush=True)
        while True:
            sock, _ = server.accept()
            threading.Thread(target=_send, args=(sock, data), daemon=True).start()


def _send(sock: socket.socket, data: memoryview) -> None:
    """As many bytes as are asked for, from where they are asked for, again and again."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError), sock:
        while head := sock.recv(16, socket.MSG_WAITALL):
            start, size = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
            sock.sendall(data[start : start + size])
