"""Blocks on a device that the processor does not reach, and what copies to and from it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import defaultdict
from collections.abc import Callable

from kvxfer import Region, TransportError
from kvxfer.transports.bounce import Chunk


class FakeDeviceRegion(Region):
    """Its `address` points nowhere; only `DeferredCopies` and a dmabuf lead to the bytes."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._make(num_blocks, block_bytes, 0, 0, True)
        self.device = "cuda:0"
        self.buffer = memoryview(bytearray())
        self.offset = 512  # of block 0 in the allocation
        self._memory_fd = os.memfd_create("fake-device", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, self.offset + self.num_bytes)
        self._memory = mmap.mmap(self._memory_fd, self.offset + self.num_bytes)
        self.address = 0x7F_0000_0000_0200

    def there(self) -> int:
        """Where the bytes really are."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return first + self.offset

    def block(self, block_id: int) -> memoryview:
        start = self.offset + block_id * self.block_bytes
        return memoryview(self._memory)[start : start + self.block_bytes]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self._memory_fd)
        super().close()


def dmabuf_of(region: Region) -> tuple[int, int]:
    assert isinstance(region, FakeDeviceRegion)
    return os.dup(region._memory_fd), region.offset


class DeferredCopies:
    """Copies nothing before it is waited for, so that a wait that is missing shows."""

    def __init__(self, region: Region, num_slots: int, num_bytes: int) -> None:
        if not isinstance(region, FakeDeviceRegion):
            raise TransportError("a region of the host is not staged")
        self._there = region.there()
        self._ring = ctypes.create_string_buffer(num_bytes)
        self.address = ctypes.addressof(self._ring)
        self._begun: defaultdict[int, list[Callable[[], object]]] = defaultdict(list)

    def to_host(self, slot: int, at: int, chunk: Chunk) -> None:
        self._begin(slot, at, chunk, to_host=True)

    def to_device(self, slot: int, at: int, chunk: Chunk) -> None:
        self._begin(slot, at, chunk, to_host=False)

    def _begin(self, slot: int, at: int, chunk: Chunk, *, to_host: bool) -> None:
        assert not self._begun[slot], "the slot is in use"
        for start, size in chunk:
            ends = (self.address + at, self._there + start)
            to, source = ends if to_host else ends[::-1]
            self._begun[slot].append(lambda t=to, s=source, n=size: ctypes.memmove(t, s, n))
            at += size

    def wait(self, slot: int) -> None:
        for copy in self._begun.pop(slot, []):
            copy()

    def close(self) -> None:
        assert not any(self._begun.values()), "a copy is under way"
