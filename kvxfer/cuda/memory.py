"""Pools that other processes can open, and other processes' pools opened here.

CUDA IPC exports whole allocations. A pool out of PyTorch's allocator lies somewhere in a larger
one, and in none at all that could be exported where the allocator uses expandable segments;
`cuda_region` has an allocation of its own, of exactly its blocks.
"""

from __future__ import annotations

import weakref
from typing import Any

from kvxfer.cuda.driver import Driver, driver, ordinal_of
from kvxfer.errors import KVUsageError, TransportError
from kvxfer.region import DeviceRegion


class _Allocation:
    """Device memory, freed with the last tensor over it."""

    def __init__(self, num_bytes: int, device: int) -> None:
        with driver().current(device):
            address = driver().allocate(num_bytes)
            weakref.finalize(self, _free, device, address).atexit = False
            driver().zero(address, num_bytes)
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _free(device: int, address: int) -> None:
    with driver().current(device):
        driver().free(address)


def cuda_tensor(num_bytes: int, device: str) -> Any:
    """A flat tensor of zeroed bytes in an allocation of its own. Raises MemoryError."""
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    ordinal = torch.device(device).index
    ordinal = torch.cuda.current_device() if ordinal is None else ordinal
    return torch.as_tensor(_Allocation(num_bytes, ordinal), device=f"cuda:{ordinal}")


def cuda_region(
    num_blocks: int, block_bytes: int, device: str = "cuda", *, epoch: int = 0
) -> DeviceRegion:
    """A region on a CUDA device that peers can open whatever PyTorch's allocator does.

    Its `tensor` are the bytes of all blocks, zeroed; view it as what the engine needs. The memory
    goes back with the last view. Raises KVUsageError, MemoryError, TransportError.
    """
    if num_blocks < 1 or block_bytes < 1:
        raise KVUsageError(f"a region of {num_blocks} blocks of {block_bytes} bytes")
    tensor = cuda_tensor(num_blocks * block_bytes, device)
    return DeviceRegion(tensor, num_blocks, block_bytes, epoch=epoch)


def export(region: DeviceRegion) -> tuple[bytes, int, int]:
    """(handle, where the blocks begin in its allocation, the allocation's bytes).

    Raises KVUsageError for memory that CUDA IPC cannot export.
    """
    cuda = driver()
    with cuda.current(ordinal_of(region.device)):
        base, size = cuda.allocation(region.address)
        try:
            handle = cuda.export(base)
        except TransportError as error:
            raise KVUsageError(
                f"this pool cannot be opened by other processes ({error}): allocate it with "
                "kvxfer.cuda_region, or without PyTorch's expandable segments"
            ) from error
    return handle, region.address - base, size


class Opened:
    """Another process's allocation, mapped for one of our devices until `close`."""

    def __init__(self, handle: bytes, device: int) -> None:
        self._device = device
        self._cuda: Driver = driver()
        with self._cuda.current(device):
            self.address = self._cuda.open_exported(handle)

    def close(self) -> None:
        """Let go of it. Nothing that runs may use it. Idempotent."""
        if self.address:
            with self._cuda.current(self._device):
                self._cuda.close_exported(self.address)
            self.address = 0
