"""How the blocks of a peer's pool reach ours, by what the devices can do.

direct    our device reads the peer's memory itself: the same device, or one that it has access
          to (NVLink, PCIe)
staged    no access: the peer's device gathers the pieces into a buffer of its own, the driver
          copies that to ours (through the host where it must), our device scatters it
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from kvxfer.cuda.driver import driver
from kvxfer.cuda.lanes import Lane
from kvxfer.cuda.memory import Opened
from kvxfer.cuda.mover import By, Piece, has_kernel, start, start_pieces
from kvxfer.errors import TransportError
from kvxfer.plan import ReadPlan

Kind = Literal["auto", "direct", "staged"]
STAGE_BYTES = 32 << 20
"""Copied at once by the staged way; there are two such buffers on each device."""
_BRIEF_S = 250e-6
"""What should come within this time is waited for on a processor: waking takes tens of us."""
_MOST_BRIEF_BYTES = 64 << 20


class Way(Protocol):
    """From one opened pool into one device of ours."""

    kind: str

    def copy(self, lane: Lane, plan: ReadPlan, destination: int) -> None:
        """Do the read; its bytes are there when this returns. Raises TransportError."""

    def close(self) -> None:
        """Let go of the pool. Nothing is under way."""


class Pool:
    """Where a pool of another process lies, or one of this process (`address`)."""

    def __init__(self, device: str, handle: bytes, offset: int, address: int | None) -> None:
        self.device, self.handle, self.offset, self.address = device, handle, offset, address

    def open(self, device: int) -> tuple[int, Opened | None]:
        """(block 0 as `device` sees it, what must be closed)."""
        if self.address is not None:
            return self.address, None
        opened = Opened(self.handle, device)
        return opened.address + self.offset, opened


def open_way(pool: Pool, device: int, kind: Kind = "auto", by: By = "auto") -> Way:
    """The best way from the pool into `device`. Raises TransportError that says why there is none.

    A device that this process does not see (CUDA_VISIBLE_DEVICES) can be opened all the same
    where the two have access to each other; nobody can be asked before whether they do.
    """
    cuda = driver()
    source = cuda.ordinal(pool.device)
    if source is None:
        try:
            return Direct(pool, device, None, by)
        except TransportError as error:
            raise TransportError(
                f"{pool.device} is not among the devices that this process sees, and cannot be "
                f"read by cuda:{device} without that ({error})"
            ) from error
    if kind == "staged" or (kind == "auto" and not cuda.can_access(device, source)):
        return Staged(pool, device, source, by)
    return Direct(pool, device, source, by)


class Direct:
    """See the module.

    A thread that waits for a read sleeps, but for about its last 250 us, as fast as the read
    before came: those it waits for on a processor, with the interpreter's lock let go.
    """

    kind = "direct"

    def __init__(self, pool: Pool, device: int, source: int | None, by: By) -> None:
        if pool.address is not None and source not in (None, device):
            driver().enable_access(device, int(source or 0))
        self._address, self._opened = pool.open(device)
        # Within a device the kernel is as good for long pieces, and the engines are not.
        self._by: By = "kernel" if by == "auto" and source == device and has_kernel() else by
        self._brief_bytes = 0

    def copy(self, lane: Lane, plan: ReadPlan, destination: int) -> None:
        """See `Way`."""
        num_bytes, brief_bytes = plan.num_bytes, self._brief_bytes
        begun = time.perf_counter()
        start(
            *(lane, plan, self._address, destination, self._by),
            split=True,
            brief_bytes=brief_bytes,
        )
        lane.wait(briefly=num_bytes <= brief_bytes)
        at_that_rate = num_bytes * _BRIEF_S / (time.perf_counter() - begun)
        self._brief_bytes = min(int(at_that_rate), _MOST_BRIEF_BYTES)

    def close(self) -> None:
        """See `Way`."""
        if self._opened is not None:
            self._opened.close()


class _Slot:
    """Buffers and lanes of one chunk under way."""

    def __init__(self, device: int, source: int) -> None:
        self.here, self.there = Lane(device), Lane(source)
        self._buffers = [_empty(STAGE_BYTES, index) for index in (device, source)]
        self.buffer_here, self.buffer_there = (int(b.data_ptr()) for b in self._buffers)


def _empty(num_bytes: int, device: int) -> Any:
    """Memory that nothing under way uses any more."""
    import torch

    found = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return found


class Staged:
    """See the module. One read at a time."""

    kind = "staged"

    def __init__(self, pool: Pool, device: int, source: int, by: By) -> None:
        self._device, self._source, self._by = device, source, by
        self._address, self._opened = pool.open(source)
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def copy(self, lane: Lane, plan: ReadPlan, destination: int) -> None:
        """See `Way`."""
        with self._lock:
            if not self._slots:
                self._slots = [_Slot(self._device, self._source) for _ in range(2)]
            try:
                for turn, chunk in enumerate(_chunks(plan.pieces())):
                    slot = self._slots[turn % 2]
                    slot.here.wait()
                    self._copy(slot, chunk, destination)
            finally:
                for slot in self._slots:
                    slot.here.wait()

    def _copy(self, slot: _Slot, chunk: list[Piece], destination: int) -> None:
        cuda = driver()
        gathered: list[Piece] = []
        scattered: list[Piece] = []
        size = 0
        for src, dst, num_bytes in chunk:
            gathered.append((src, size, num_bytes))
            scattered.append((size, dst, num_bytes))
            size += num_bytes
        with cuda.current(self._source):
            start_pieces(slot.there, gathered, self._address, slot.buffer_there, self._by)
            cuda.copy(slot.buffer_here, slot.buffer_there, size, slot.there.stream)
            there = slot.there.record()
        cuda.follow(slot.here.stream, there)
        start_pieces(slot.here, scattered, slot.buffer_here, destination, self._by)

    def close(self) -> None:
        """See `Way`."""
        for slot in self._slots:
            slot.here.close()
            slot.there.close()
        self._slots = []
        if self._opened is not None:
            self._opened.close()


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces cut so that each chunk fits a buffer."""
    chunk: list[Piece] = []
    room = STAGE_BYTES
    for src, dst, num_bytes in pieces:
        while num_bytes:
            part = min(num_bytes, room)
            chunk.append((src, dst, part))
            src, dst, num_bytes, room = src + part, dst + part, num_bytes - part, room - part
            if not room:
                yield chunk
                chunk, room = [], STAGE_BYTES
    if chunk:
        yield chunk
