"""Between a region on a device and what only moves host memory: a ring of page-locked slots.

While one slot is sent or filled, the device copies the next or the last one; the ring has a stream
of its own for each slot. The bytes of many pieces lie in a slot one after another.

    for view in bounce.to_host(pieces): send(view)
    for view in bounce.to_device(pieces): receive_into(view)

A view is the caller's until the next one is asked for. Whoever stops early closes the iterator
(a `for` that raises does): then no copy is under way any more.
"""

from __future__ import annotations

import ctypes
import errno
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from kvxfer.errors import TransportError
from kvxfer.region import Region

if TYPE_CHECKING:
    from kvxfer.cuda.driver import Driver

SLOT_BYTES = 4 << 20
NUM_SLOTS = 3

Pieces = Sequence[tuple[int, int]]
"""(first byte, length), counted from the region's block 0"""
Chunk = list[tuple[int, int]]


class Copies(Protocol):
    """What a ring copies with. `num_bytes` of page-locked memory lie at `address`."""

    address: int

    def to_host(self, slot: int, at: int, chunk: Chunk) -> None:
        """Begin to copy pieces of the region to the ring's byte `at` and on."""

    def to_device(self, slot: int, at: int, chunk: Chunk) -> None:
        """Begin to copy what lies from the ring's byte `at` on into pieces of the region."""

    def wait(self, slot: int) -> None:
        """Until what was begun for this slot is done."""

    def close(self) -> None:
        """Give the ring's memory back; nothing is under way."""


class Bounce:
    """See the module. One use at a time. Raises TransportError, MemoryError."""

    def __init__(
        self,
        region: Region,
        *,
        slot_bytes: int = 0,
        num_slots: int = NUM_SLOTS,
        make: Callable[[Region, int, int], Copies] | None = None,
    ) -> None:
        self._slot_bytes, self._num_slots = slot_bytes or SLOT_BYTES, num_slots
        self.num_bytes = self._slot_bytes * num_slots
        self._copies = (make or CudaCopies)(region, num_slots, self.num_bytes)
        self.address = self._copies.address
        """Where the ring lies, `num_bytes` long: for who registers it with a device."""
        ring = (ctypes.c_char * self.num_bytes).from_address(self.address)
        self._ring = memoryview(ring).cast("B")

    def to_host(self, pieces: Pieces) -> Generator[memoryview]:
        """The pieces' bytes, in order."""
        chunks = self._chunks(pieces)
        with self._quiet():
            begun = 0
            for done, chunk in enumerate(chunks):
                while begun < len(chunks) and begun < done + self._num_slots:
                    slot = begun % self._num_slots
                    self._copies.to_host(slot, slot * self._slot_bytes, chunks[begun])
                    begun += 1
                self._copies.wait(done % self._num_slots)
                yield self._view(done, chunk)

    def to_device(self, pieces: Pieces) -> Generator[memoryview]:
        """Room for the pieces' bytes, in order. All are in the region when it ends."""
        chunks = self._chunks(pieces)
        with self._quiet():
            for turn, chunk in enumerate(chunks):
                slot = turn % self._num_slots
                if turn >= self._num_slots:
                    self._copies.wait(slot)
                yield self._view(turn, chunk)
                self._copies.to_device(slot, slot * self._slot_bytes, chunk)

    def close(self) -> None:
        """Give the memory back. Idempotent; not during a use."""
        if self.address:
            self._ring.release()
            self._copies.close()
            self.address = 0

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Nothing is under way afterwards; a failure of that is told unless something else was."""
        failed = True
        try:
            yield
            failed = False
        finally:
            for slot in range(self._num_slots):
                if failed:
                    with suppress(TransportError):
                        self._copies.wait(slot)
                else:
                    self._copies.wait(slot)

    def _view(self, turn: int, chunk: Chunk) -> memoryview:
        start = turn % self._num_slots * self._slot_bytes
        return self._ring[start : start + sum(size for _, size in chunk)]

    def _chunks(self, pieces: Pieces) -> list[Chunk]:
        """The pieces cut so that each chunk fits a slot."""
        chunks: list[Chunk] = []
        room = 0
        for start, size in pieces:
            while size:
                if not room:
                    chunks.append([])
                    room = self._slot_bytes
                part = min(size, room)
                chunks[-1].append((start, part))
                start, size, room = start + part, size - part, room - part
        return chunks


class CudaCopies:
    """A ring beside a region on a CUDA device: a lane for each slot."""

    def __init__(self, region: Region, num_slots: int, num_bytes: int) -> None:
        from kvxfer.cuda.driver import driver, ordinal_of
        from kvxfer.cuda.lanes import Lane

        self._cuda, self._data = driver(), region.address
        self._device = ordinal_of(region.device)
        with self._cuda.current(self._device):
            self.address = self._cuda.allocate_host(num_bytes)
        self._release = weakref.finalize(self, _free_host, self._cuda, self._device, self.address)
        self._release.atexit = False
        self._lanes = [Lane(self._device) for _ in range(num_slots)]

    def to_host(self, slot: int, at: int, chunk: Chunk) -> None:
        """See `Copies`."""
        self._start(slot, [(start, to, size) for (start, size), to in _packed(at, chunk)], True)

    def to_device(self, slot: int, at: int, chunk: Chunk) -> None:
        """See `Copies`."""
        self._start(slot, [(to, start, size) for (start, size), to in _packed(at, chunk)], False)

    def _start(self, slot: int, pieces: list[tuple[int, int, int]], to_host: bool) -> None:
        from kvxfer.cuda.mover import start_pieces

        ends = (self._data, self.address)
        with self._cuda.current(self._device):
            start_pieces(self._lanes[slot], pieces, *(ends if to_host else ends[::-1]))

    def wait(self, slot: int) -> None:
        """See `Copies`."""
        with self._cuda.current(self._device):
            self._lanes[slot].wait()

    def close(self) -> None:
        """See `Copies`."""
        for lane in self._lanes:
            lane.close()
        self._release()


def _free_host(cuda: Driver, device: int, address: int) -> None:
    with cuda.current(device):
        cuda.free_host(address)


def _packed(at: int, chunk: Chunk) -> list[tuple[tuple[int, int], int]]:
    """Each piece with where its bytes lie when they follow one another from `at` on."""
    found = []
    for piece in chunk:
        found.append((piece, at))
        at += piece[1]
    return found


class Bounces:
    """Idle rings by region, for threads that come and go. Safe to share among threads."""

    def __init__(self) -> None:
        self._idle: weakref.WeakKeyDictionary[Region, list[Bounce]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._closes = 0

    @contextmanager
    def use(self, region: Region) -> Iterator[Bounce]:
        """A ring for the region. After an error it is not used again."""
        with self._lock:
            idle = self._idle.setdefault(region, [])
            bounce, closes = (idle.pop() if idle else None), self._closes
        try:
            bounce = bounce or Bounce(region)
        except MemoryError as error:
            raise TransportError(f"no page-locked memory: {error}", errno=errno.ENOMEM) from error
        try:
            yield bounce
        except BaseException:
            bounce.close()
            raise
        with self._lock:
            if closes == self._closes:
                idle.append(bounce)
                return
        bounce.close()

    def close(self) -> None:
        """Give back those that are idle; the others go when their use ends."""
        with self._lock:
            idle = [bounce for found in self._idle.values() for bounce in found]
            self._idle.clear()
            self._closes += 1
        for bounce in idle:
            bounce.close()
