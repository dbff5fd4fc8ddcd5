"""A CUDA driver whose devices are this process's memory, for what needs no GPU to be tested.

Streams do at once what they are given; a handle is a number of this process. What is open is
counted: allocations, host memory, streams, events, opened handles.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvxfer import DeviceRegion, TransportError
from kvxfer.cuda import driver as driver_module
from kvxfer.cuda import mover

HANDLE = b"kvxfer-test"


class FakeDriver:
    """See the module. Two devices, with access to each other unless `access` is false."""

    has_batch = True

    def __init__(self) -> None:
        self.num_devices = 2
        self.access = True
        self.visible = ["GPU-a", "GPU-b"]
        self.refuses: set[str] = set()
        self.held: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self._memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._numbers = itertools.count(1)
        self._handles: dict[bytes, int] = {}
        self._current = threading.local()
        self.pools: dict[int, int] = {}

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        stack = self._current.__dict__.setdefault("stack", [])
        stack.append(device)
        try:
            yield
        finally:
            stack.pop()

    def _need_context(self) -> None:
        assert self._current.__dict__.get("stack"), "no device is current"

    def uuid(self, device: int) -> str:
        return self.visible[device]

    def ordinal(self, uuid: str) -> int | None:
        return self.visible.index(uuid) if uuid in self.visible else None

    def can_access(self, device: int, peer: int) -> bool:
        return device == peer or self.access

    def enable_access(self, device: int, peer: int) -> None:
        assert self.access
        self.done["enable_access"] += 1

    def allocation(self, address: int) -> tuple[int, int]:
        self._need_context()
        for base, size in reversed(self.pools.items()):  # older ones may be gone
            if base <= address < base + size:
                return base, size
        raise TransportError("cuMemGetAddressRange: CUDA_ERROR_INVALID_VALUE (1)")

    def export(self, base: int) -> bytes:
        if "export" in self.refuses:
            raise TransportError("cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE (1)")
        handle = HANDLE.ljust(56, b"\0") + base.to_bytes(8, "big")
        self._handles[handle] = base
        return handle

    def open_exported(self, handle: bytes) -> int:
        self._need_context()
        if "open" in self.refuses or handle not in self._handles:
            raise TransportError("cuIpcOpenMemHandle: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (217)")
        self._take("opened")
        return self._handles[handle]

    def close_exported(self, address: int) -> None:
        self._give("opened")

    def allocate_host(self, num_bytes: int) -> int:
        self._need_context()
        self._take("host")
        memory = ctypes.create_string_buffer(num_bytes)
        self._memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free_host(self, address: int) -> None:
        self._need_context()
        del self._memory[address]
        self._give("host")

    def stream(self, priority: int) -> int:
        self._need_context()
        self._take("stream")
        return next(self._numbers)

    def destroy_stream(self, stream: int) -> None:
        self._give("stream")

    def event(self, *, sleeps: bool = True, timed: bool = False) -> int:
        self._take("event")
        return next(self._numbers)

    def destroy_event(self, event: int) -> None:
        self._give("event")

    def record(self, event: int, stream: int) -> None:
        self._need_context()

    def follow(self, stream: int, event: int) -> None:
        self._need_context()

    def wait(self, event: int) -> None:
        self._need_context()
        if "wait" in self.refuses:
            raise TransportError("the work on the device: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    def copy(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        self._need_context()
        ctypes.memmove(to, source, num_bytes)

    def copy_batch(
        self, to: array[int], source: array[int], sizes: array[int], stream: int
    ) -> None:
        self._need_context()
        self.done["batches"] += 1
        for piece in zip(to, source, sizes, strict=True):
            ctypes.memmove(*piece)

    def _take(self, what: str) -> None:
        self.held[what] += 1

    def _give(self, what: str) -> None:
        self.held[what] -= 1
        assert self.held[what] >= 0, what


class FakeCudaRegion(DeviceRegion):
    """Blocks in host memory that are said to lie on a device."""

    def __init__(self, num_blocks: int, block_bytes: int, device: str = "cuda:0") -> None:
        tensor = torch.zeros(num_blocks * block_bytes, dtype=torch.uint8)
        super().__init__(tensor, num_blocks, block_bytes)
        self.device = device
        fake = driver_module.driver()
        assert isinstance(fake, FakeDriver)
        fake.pools.pop(self.address, None)
        fake.pools[self.address] = self.num_bytes


@contextmanager
def fake_cuda() -> Iterator[FakeDriver]:
    """The only driver there is, meanwhile; without Triton."""
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeDriver()
        patch.setattr(driver_module, "Driver", lambda: fake)
        patch.setattr(mover, "has_kernel", lambda: False)
        driver_module.driver.cache_clear()
        yield fake
    driver_module.driver.cache_clear()
