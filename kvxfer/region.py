"""The memory that KV blocks lie in, with what proves that a block is still the same.

    header, one page: magic, epoch, blocks, block bytes, 1 while open, the region's id
    generations: 8 bytes a block, in whole pages
    blocks

The owner raises a block's generation *before* it writes other content into the block, and raises
the epoch when a new life begins. A reader copies first and looks at both afterwards: equal numbers
prove that no byte it copied was overwritten meanwhile (the idea of a seqlock).

The blocks of a `DeviceRegion` lie on an accelerator; its memfd holds the other two parts alone.

A shared region is a memfd: a peer of the same user maps it through `/proc/<pid>/fd/<n>`. It has no
name in any file system, so a killed owner leaves nothing behind once its readers let go, and no
sweep is needed. The id in the header tells a peer whether that descriptor is still this region.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvxfer.errors import KVUsageError
from kvxfer.pages import LargePages, shared_buffer

MAGIC = 0x4B56_5846_4552_0002
PAGE_BYTES = 4096
HEADER = struct.Struct("=QQQQQQ")  # magic, epoch, num_blocks, block_bytes, 1 while open, id
EPOCH, OPEN = 1, 4


def data_offset(num_blocks: int) -> int:
    """Where the blocks begin: after the header and the generations, on a page."""
    return PAGE_BYTES + -(-num_blocks * 8 // PAGE_BYTES) * PAGE_BYTES


class Region:
    """`num_blocks` blocks of `block_bytes` bytes. The owner closes it; readers have views.

    `buffer` are the blocks alone (writable), `generations` one unsigned 64-bit number a block.
    `address` is where block 0 lies, a pointer that is good on `device`.
    Raises KVUsageError for impossible sizes.
    """

    device = "cpu"
    buffer: memoryview
    _pages: LargePages | None = None

    def __init__(
        self, num_blocks: int, block_bytes: int, *, epoch: int = 0, shared: bool = True
    ) -> None:
        self._make(num_blocks, block_bytes, num_blocks * block_bytes, epoch, shared)
        self.buffer = self._view[data_offset(num_blocks) :]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        if shared:
            first = data_offset(num_blocks)
            self._pages = LargePages(self.address - first, first + num_blocks * block_bytes)

    def _make(
        self, num_blocks: int, block_bytes: int, data_bytes: int, epoch: int, shared: bool
    ) -> None:
        """Everything but the blocks; `data_bytes` of the memory are for those."""
        if num_blocks < 1 or block_bytes < 1:
            raise KVUsageError(f"a region of {num_blocks} blocks of {block_bytes} bytes")
        self.id = secrets.token_hex(8)
        self.on_revoke: list[Callable[[], None]] = []
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        size = data_offset(num_blocks) + data_bytes
        self.fd = -1
        if shared:
            self.fd = os.memfd_create(f"kvxfer-{self.id}", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
        self._attach(shared_buffer(self.fd, size) if shared else mmap.mmap(-1, size))
        number = int(self.id, 16)
        HEADER.pack_into(self._map, 0, MAGIC, epoch, num_blocks, block_bytes, 1, number)

    def _attach(self, mapped: Any) -> None:
        self._map = mapped
        self._view = view = memoryview(mapped).cast("B")
        self._head = view[: HEADER.size].cast("Q")
        self.generations = view[PAGE_BYTES : PAGE_BYTES + 8 * self.num_blocks].cast("Q")

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def epoch(self) -> int:
        """The owner's life."""
        return int(self._head[EPOCH])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._head[EPOCH] = value

    @property
    def open(self) -> bool:
        """False once the owner revoked the region."""
        return bool(self._head[OPEN])

    def revoke(self) -> None:
        """No transport gives these bytes out any more; each of `on_revoke` is called, once."""
        self._head[OPEN] = 0
        hooks, self.on_revoke = self.on_revoke, []
        for hook in hooks:
            hook()

    def bump(self, block_ids: Iterable[int]) -> None:
        """These blocks are about to hold other content. Call before the first write."""
        generations = self.generations
        for block in block_ids:
            generations[block] += 1

    def take(self, block_ids: Sequence[int]) -> None:
        """`bump`; and what shares their memory lies in large pages from now on (`kvxfer.pages`)."""
        self.bump(block_ids)
        if self._pages is not None:
            first = data_offset(self.num_blocks)
            self._pages.use((first + b * self.block_bytes for b in block_ids), self.block_bytes)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raises KVUsageError unless the region has all of these blocks."""
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            lowest, highest = min(block_ids), max(block_ids)
            raise KVUsageError(f"blocks {lowest} to {highest} in a region of {self.num_blocks}")

    def stamps(self, block_ids: Sequence[int]) -> list[int]:
        """The generations of these blocks now."""
        generations = self.generations
        return [generations[block] for block in block_ids]

    def proof(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The header and these blocks' generations as bytes in memory, for who sends them away."""
        found = [self._view[: HEADER.size]]
        first = last = PAGE_BYTES
        for block in block_ids:
            at = PAGE_BYTES + 8 * block
            if at != last:
                found.append(self._view[first:last])
                first = at
            last = at + 8
        found.append(self._view[first:last])
        return found

    def block(self, block_id: int) -> memoryview:
        """The bytes of one block."""
        start = block_id * self.block_bytes
        return self.buffer[start : start + self.block_bytes]

    def close(self) -> None:
        """Revoke it and let go of its descriptor. Idempotent. The memory goes back when the last
        view of it is gone, this object's among them."""
        self.revoke()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DeviceRegion(Region):
    """A region whose blocks lie in the caller's tensor, on the tensor's device.

    `tensor` is contiguous and has exactly the bytes of all blocks; here it is a flat view of
    bytes, and the region keeps it alive until `close`. `buffer` is empty.
    Raises KVUsageError for a tensor that does not fit.
    """

    def __init__(self, tensor: Any, num_blocks: int, block_bytes: int, *, epoch: int = 0) -> None:
        import torch

        if not tensor.is_contiguous() or tensor.nbytes != num_blocks * block_bytes:
            raise KVUsageError(
                f"{tensor.nbytes} bytes for {num_blocks} blocks of {block_bytes}, "
                f"contiguous: {tensor.is_contiguous()}"
            )
        self._make(num_blocks, block_bytes, 0, epoch, True)
        self.tensor = tensor.view(-1).view(torch.uint8)
        self.device = str(tensor.device)
        self.buffer = memoryview(bytearray())
        self.address = int(tensor.data_ptr())

    def block(self, block_id: int) -> memoryview:
        """A copy of the bytes of one block, in host memory: for tests and for people."""
        start = block_id * self.block_bytes
        return memoryview(self.tensor[start : start + self.block_bytes].cpu().numpy()).cast("B")

    def close(self) -> None:
        """See `Region.close`; the tensor is the caller's alone again."""
        super().close()
        self.tensor = None


def runs(src: Sequence[int], dst: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first source, first destination, count) of neighbours on both sides, in order."""
    found: list[tuple[int, int, int]] = []
    for s, d in zip(src, dst, strict=True):
        if found and found[-1][0] + found[-1][2] == s and found[-1][1] + found[-1][2] == d:
            first_s, first_d, count = found[-1]
            found[-1] = (first_s, first_d, count + 1)
        else:
            found.append((s, d, 1))
    return found
