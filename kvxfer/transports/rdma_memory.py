"""Memory that NICs may touch: registered with each of them, for as long as it is wanted.

Host memory is registered by its address. Memory of a GPU goes through a dmabuf where driver,
kernel and NIC can: then the NIC reads and writes the GPU itself. Where they cannot, it is left to
`rdma_staging`.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from kvxfer.errors import BadDescriptor, TransportError
from kvxfer.region import PAGE_BYTES, Region, data_offset
from kvxfer.transports.rdma_device import Device, Spot, close_each
from kvxfer.transports.rdma_verbs import REMOTE_READ

logger = logging.getLogger(__name__)
_DMABUF_FD = 1
"""CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD"""


class Registered:
    """One piece of memory, registered with every device; `spots` in the order of the devices."""

    def __init__(self, regions: Sequence[Any], spots: Sequence[Spot]) -> None:
        self._regions, self.spots = list(regions), list(spots)

    def close(self) -> None:
        """Nobody reaches it any more, whatever keys he has. Idempotent."""
        self.spots = []
        close_each(self._regions)


def register_host(
    devices: Sequence[Device], address: int, num_bytes: int, access: int, *, relaxed: bool = False
) -> Registered:
    """Memory of the host. Raises TransportError."""
    made = _each(
        devices,
        lambda device: device.register(address, num_bytes, access, relaxed=relaxed),
    )
    keys = _keys(made, access)
    return Registered(made, [Spot(address, key) for key in keys])


def register_proof(devices: Sequence[Device], region: Region) -> Registered:
    """A region's header and generations, for others to read. Raises TransportError."""
    generations = ctypes.addressof(ctypes.c_char.from_buffer(region.generations))
    size = data_offset(region.num_blocks)
    return register_host(devices, generations - PAGE_BYTES, size, REMOTE_READ)


def register_blocks(devices: Sequence[Device], region: Region, access: int) -> Registered | None:
    """A region's blocks; None where they lie on a device that some NIC cannot reach.

    Raises TransportError.
    """
    if region.device == "cpu":
        return register_host(devices, region.address, region.num_bytes, access, relaxed=True)
    try:
        fd, offset = export_dmabuf(region)
    except TransportError as error:
        logger.info("%s: no dmabuf, blocks are staged in host memory: %s", region.device, error)
        return None
    try:
        made = _each(
            devices,
            lambda device: device.register_dmabuf(fd, offset, region.num_bytes, access),
        )
    except TransportError as error:
        logger.info("%s: dmabuf refused, blocks are staged: %s", region.device, error)
        return None
    finally:
        os.close(fd)  # the registrations hold the memory
    return Registered(made, [Spot(offset, key) for key in _keys(made, access)])


def export_dmabuf(region: Region) -> tuple[int, int]:
    """A descriptor of the region's blocks on a CUDA device, and where in it block 0 lies.

    Raises TransportError where the driver cannot: an old one, or a kernel without dmabuf.
    """
    from kvxfer.cuda.driver import driver, ordinal_of

    cuda = driver()
    export = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemGetHandleForAddressRange", None)
    if export is None:
        raise TransportError("the CUDA driver is too old for dmabuf")
    first = region.address // mmap.PAGESIZE * mmap.PAGESIZE
    offset = region.address - first
    size = -(-(offset + region.num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = ctypes.c_int(-1)
    export.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_ulonglong)
    ]
    with cuda.current(ordinal_of(region.device)):
        cuda.check(export(ctypes.byref(fd), first, size, _DMABUF_FD, 0), "a dmabuf of the pool")
    return fd.value, offset


def told_spots(spots: Sequence[Spot]) -> list[list[int]]:
    """For the control connection alone."""
    return [[spot.address, spot.key] for spot in spots]


def heard_spots(message: Any) -> list[Spot]:
    """The inverse. Raises BadDescriptor."""
    try:
        found = [Spot(address, key) for address, key in message]
    except (TypeError, ValueError) as error:
        raise BadDescriptor("no memory is told") from error
    for spot in found:
        if type(spot.address) is not int or type(spot.key) is not int:
            raise BadDescriptor("no memory is told")
        if not (0 <= spot.address < 1 << 64 and 0 <= spot.key < 1 << 32):
            raise BadDescriptor("no memory is told")
    return found


def _each(devices: Sequence[Device], make: Callable[[Device], Any]) -> list[Any]:
    """On every device, or on none."""
    made: list[Any] = []
    try:
        for device in devices:
            made.append(make(device))
    except BaseException:
        close_each(made)
        raise
    return made


def _keys(made: Sequence[Any], access: int) -> list[int]:
    """What others need, where they may read; else what our own requests need."""
    return [int(region.rkey if access & REMOTE_READ else region.lkey) for region in made]
