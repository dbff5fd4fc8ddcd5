"""What the scripts of all rivals do alike; runs in a Python that may not have kvxfer.

line in                                     line out
{"role": "serve", "pool_bytes"}             what the reader has to know, as JSON
{"role": "read", "pool_bytes", "remote"}    ready
{"block_bytes", "tables"}                   ready: all were prepared, the first was looked at
the number of a turn                        its seconds
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

FILL = 7
Pieces = Sequence[tuple[int, int, int]]
"""(source byte, destination byte, length)"""


class Reader(Protocol):
    """The end that reads."""

    address: int
    """Where its pool lies."""

    def prepare(self, pieces: Pieces) -> Any:
        """Whatever can be done before."""

    def read(self, prepared: Any) -> None:
        """All bytes are there when it returns."""


def pool(num_bytes: int, fill: int) -> tuple[mmap.mmap, int]:
    """(memory, address): touched, in huge pages where the system gives them, as a region's are."""
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, fill, num_bytes)
    return memory, address


def pieces(source: Sequence[int], target: Sequence[int], block_bytes: int) -> Pieces:
    """Neighbours at both ends are one."""
    found: list[tuple[int, int, int]] = []
    at = to = size = 0
    for here, there in zip(source, target):  # noqa: B905 - Pythons of others may be old
        if size and (at + size, to + size) == (here * block_bytes, there * block_bytes):
            size += block_bytes
            continue
        if size:
            found.append((at, to, size))
        at, to, size = here * block_bytes, there * block_bytes, block_bytes
    return [*found, (at, to, size)]


def main(serve: Callable[[int], Any], reader: Callable[[int, Any], Reader]) -> None:
    """`serve(pool_bytes)` gives what `reader(pool_bytes, remote)` needs."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not disturb
    asked = json.loads(sys.stdin.readline())
    if asked["role"] == "serve":
        print(json.dumps(serve(asked["pool_bytes"])), file=out, flush=True)
        sys.stdin.read()
        os._exit(0)
    end = reader(asked["pool_bytes"], asked["remote"])
    print("ready", file=out, flush=True)
    prepared: list[Any] = []
    for line in sys.stdin:
        said = json.loads(line)
        if isinstance(said, dict):
            tables, block_bytes = said["tables"], said["block_bytes"]
            prepared = [end.prepare(pieces(here, there, block_bytes)) for here, there in tables]
            _look(end, prepared[0], tables[0][1], block_bytes)
            print("ready", file=out, flush=True)
            continue
        start = time.perf_counter()
        end.read(prepared[said % len(prepared)])
        print(time.perf_counter() - start, file=out, flush=True)
    os._exit(0)


def _look(end: Reader, prepared: Any, blocks: Sequence[int], block_bytes: int) -> None:
    """Read once, and see that the bytes came."""
    for block in blocks:
        ctypes.memset(end.address + block * block_bytes, 0, block_bytes)
    end.read(prepared)
    for block in blocks:
        at = end.address + (block + 1) * block_bytes - 8
        if ctypes.string_at(at, 8) != bytes([FILL]) * 8:
            raise AssertionError("other bytes came")
