"""The CUDA driver's own interface, as far as kvxfer needs it.

The driver (`libcuda.so.1`) is the one library that every CUDA process has in one version with one
ABI, whatever runtime its PyTorch brings; contexts here are the devices' primary ones, which the
runtime uses too. Each call that can take a while lets the interpreter's lock go.

Failures are `TransportError`s that name the driver's error.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from kvxfer.errors import TransportError

HANDLE_BYTES = 64
_OK, _OUT_OF_MEMORY, _NOT_READY, _ALREADY_ENABLED = 0, 2, 600, 704
_LAZY_ENABLE_PEER_ACCESS = 1
_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC, _EVENT_DISABLE_TIMING = 1, 2
_HOST_PORTABLE, _HOST_DEVICEMAP = 1, 2
_SOURCE_ORDER_STREAM = 1
_LOCATION_NONE = 0


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes"""

    _fields_ = [
        ("order", ctypes.c_int),
        ("src_type", ctypes.c_int),
        ("src_id", ctypes.c_int),
        ("dst_type", ctypes.c_int),
        ("dst_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    ]


_MOST_ARGUMENTS = 4
_attributes, _first_index, _failed_index = (
    *(_CopyAttributes(order=_SOURCE_ORDER_STREAM), ctypes.c_size_t(0), ctypes.c_size_t()),
)
_SAME_FOR_ALL = (
    *(ctypes.addressof(_attributes), ctypes.addressof(_first_index), 1),
    ctypes.addressof(_failed_index),
)
"""Of batches: their one kind of copy, from the first on, and where it says which failed."""


class Driver:
    """Use `driver()`. Devices are the ordinals that this process sees, as PyTorch counts them."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
            self._short = ctypes.PyDLL("libcuda.so.1")  # keeps the interpreter's lock
        except OSError as error:
            raise TransportError(f"no CUDA driver: {error}") from error
        for name, kinds in _ARGUMENTS.items():
            for lib in (self._lib, self._short):
                if hasattr(lib, name):
                    getattr(lib, name).argtypes = kinds
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self.check(self._lib.cuInit(0), "cuInit")
        count = ctypes.c_int()
        self.check(self._lib.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
        self.num_devices = count.value
        self.has_batch = hasattr(self._lib, "cuMemcpyBatchAsync")

    def check(self, code: int, what: str) -> None:
        """Raises TransportError, MemoryError where the device has no more of it."""
        if code == _OK:
            return
        name = ctypes.c_char_p()
        self._lib.cuGetErrorName(code, ctypes.byref(name))
        said = f"{what}: {(name.value or b'?').decode()} ({code})"
        raise MemoryError(said) if code == _OUT_OF_MEMORY else TransportError(said)

    # --- devices

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        """The device's primary context, for this thread, meanwhile."""
        self.check(self._short.cuCtxPushCurrent_v2(self._context(device)), "cuCtxPushCurrent")
        try:
            yield
        finally:
            self._short.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _context(self, device: int) -> int:
        found = self._contexts.get(device)
        if found is None:
            with self._lock:
                context = ctypes.c_void_p()
                code = self._lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
                self.check(code, f"the context of device {device}")
                found = self._contexts.setdefault(device, int(context.value or 0))
        return found

    @cache  # noqa: B019 - one driver for the process's life
    def uuid(self, device: int) -> str:
        """As nvidia-smi writes it."""
        found = _Uuid()
        name = (
            "cuDeviceGetUuid_v2" if hasattr(self._lib, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        )
        get = getattr(self._lib, name)
        self.check(get(ctypes.byref(found), device), f"the UUID of device {device}")
        text = bytes(found.bytes).hex()
        parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
        return "GPU-" + "-".join(parts)

    def ordinal(self, uuid: str) -> int | None:
        """Which of the devices that this process sees it is."""
        return next((i for i in range(self.num_devices) if self.uuid(i) == uuid), None)

    def can_access(self, device: int, peer: int) -> bool:
        """Whether kernels on `device` can read `peer`'s memory."""
        if device == peer:
            return True
        found = ctypes.c_int()
        code = self._lib.cuDeviceCanAccessPeer(ctypes.byref(found), device, peer)
        self.check(code, "cuDeviceCanAccessPeer")
        return bool(found.value)

    def enable_access(self, device: int, peer: int) -> None:
        """Kernels on `device` may read `peer`'s memory from now on, in this process."""
        with self.current(device):
            code = self._lib.cuCtxEnablePeerAccess(self._context(peer), 0)
        if code != _ALREADY_ENABLED:
            self.check(code, "cuCtxEnablePeerAccess")

    # --- memory; the device's context is current

    def allocate(self, num_bytes: int) -> int:
        """An allocation of its own, which can be exported. Raises MemoryError."""
        found = ctypes.c_uint64()
        self.check(self._lib.cuMemAlloc_v2(ctypes.byref(found), num_bytes), f"{num_bytes} bytes")
        return found.value

    def free(self, address: int) -> None:
        """The inverse of `allocate`; errors are nobody's any more."""
        self._lib.cuMemFree_v2(address)

    def zero(self, address: int, num_bytes: int) -> None:
        """Done when it returns."""
        self.check(self._lib.cuMemsetD8_v2(address, 0, num_bytes), "cuMemsetD8")
        self.check(self._lib.cuCtxSynchronize(), "cuCtxSynchronize")

    def allocate_host(self, num_bytes: int) -> int:
        """Page-locked memory of the host, which every device reads under the same address."""
        found = ctypes.c_void_p()
        flags = _HOST_PORTABLE | _HOST_DEVICEMAP
        code = self._lib.cuMemHostAlloc(ctypes.byref(found), num_bytes, flags)
        self.check(code, f"{num_bytes} bytes of page-locked memory")
        return int(found.value or 0)

    def free_host(self, address: int) -> None:
        """The inverse of `allocate_host`."""
        self._lib.cuMemFreeHost(address)

    def allocation(self, address: int) -> tuple[int, int]:
        """(first address, bytes) of the allocation that this address is in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        code = self._lib.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        self.check(code, "cuMemGetAddressRange")
        return base.value, size.value

    def export(self, base: int) -> bytes:
        """A handle that another process can open."""
        handle = _Handle()
        self.check(self._lib.cuIpcGetMemHandle(ctypes.byref(handle), base), "cuIpcGetMemHandle")
        return bytes(handle.reserved)

    def open_exported(self, handle: bytes) -> int:
        """Where the other process's allocation lies for the current device."""
        found = ctypes.c_uint64()
        given = _Handle((ctypes.c_ubyte * HANDLE_BYTES)(*handle))
        code = self._lib.cuIpcOpenMemHandle_v2(ctypes.byref(found), given, _LAZY_ENABLE_PEER_ACCESS)
        self.check(code, "cuIpcOpenMemHandle")
        return found.value

    def close_exported(self, address: int) -> None:
        """The inverse of `open_exported`."""
        self._lib.cuIpcCloseMemHandle(address)

    # --- streams and events; the device's context is current

    def stream(self, priority: int) -> int:
        """Does not wait for the default stream. Lower numbers go first."""
        found = ctypes.c_void_p()
        code = self._lib.cuStreamCreateWithPriority(ctypes.byref(found), _NON_BLOCKING, priority)
        self.check(code, "cuStreamCreate")
        return int(found.value or 0)

    def destroy_stream(self, stream: int) -> None:
        """What was given to it is still done."""
        self._lib.cuStreamDestroy_v2(stream)

    def event(self, *, sleeps: bool = True, timed: bool = False) -> int:
        """`sleeps`: who waits for it does so in the kernel, not on a processor."""
        found = ctypes.c_void_p()
        flags = sleeps * _EVENT_BLOCKING_SYNC | (not timed) * _EVENT_DISABLE_TIMING
        self.check(self._lib.cuEventCreate(ctypes.byref(found), flags), "cuEventCreate")
        return int(found.value or 0)

    def destroy_event(self, event: int) -> None:
        """The inverse of `event`."""
        self._lib.cuEventDestroy_v2(event)

    def record(self, event: int, stream: int) -> None:
        """It happens when all that the stream has now is done."""
        self.check(self._short.cuEventRecord(event, stream), "cuEventRecord")

    def follow(self, stream: int, event: int) -> None:
        """What the stream gets from now on waits for the event."""
        self.check(self._short.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")

    def wait(self, event: int) -> None:
        """Until it happened, with the interpreter's lock let go."""
        self.check(self._lib.cuEventSynchronize(event), "the work on the device")

    def happened(self, event: int) -> bool:
        """Whether it has."""
        code = self._short.cuEventQuery(event)
        if code != _NOT_READY:
            self.check(code, "the work on the device")
        return bool(code == _OK)

    def seconds(self, start: int, end: int) -> float:
        """Between two timed events."""
        found = ctypes.c_float()
        code = self._lib.cuEventElapsedTime(ctypes.byref(found), start, end)
        self.check(code, "cuEventElapsedTime")
        return found.value / 1e3

    # --- copies by the copy engines; the device's context is current

    def copy(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """From anywhere to anywhere: the addresses say what they are."""
        self.check(self._short.cuMemcpyAsync(to, source, num_bytes, stream), "cuMemcpyAsync")

    def copy_batch(
        self, to: array[int], source: array[int], sizes: array[int], stream: int
    ) -> None:
        """Many copies, in any order among themselves; one call where the driver has it.

        The arrays are of type "Q"; the driver has read them when this returns.
        """
        if len(sizes) > 1 and self.has_batch:
            self.has_batch = self._copy_batch(to, source, sizes, stream)
            if self.has_batch:
                return
        call = self._lib.cuMemcpyAsync
        for piece in zip(to, source, sizes, strict=True):
            self.check(call(*piece, stream), "cuMemcpyAsync")

    def _copy_batch(
        self, to: array[int], source: array[int], sizes: array[int], stream: int
    ) -> bool:
        """False where the driver or these devices cannot: then they are copied one by one."""
        pointers = (found.buffer_info()[0] for found in (to, source, sizes))
        code = self._lib.cuMemcpyBatchAsync(*pointers, len(sizes), *_SAME_FOR_ALL, stream)
        return bool(code == _OK)

    # --- kernels; the device's context is current

    def launch(
        self,
        function: int,
        programs: int,
        threads: int,
        shared_bytes: int,
        pointer: int,
        stream: int,
    ) -> None:
        """One whose only argument of ours is a pointer; others that its compiler adds are null."""
        values = (ctypes.c_uint64 * _MOST_ARGUMENTS)(pointer)
        step = ctypes.sizeof(ctypes.c_uint64)
        first = ctypes.addressof(values)
        each = (ctypes.c_void_p * _MOST_ARGUMENTS)(
            *range(first, first + step * _MOST_ARGUMENTS, step)
        )
        code = self._lib.cuLaunchKernel(
            *(function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, each, None)
        )
        self.check(code, "cuLaunchKernel")


@cache
def driver() -> Driver:
    """The process's. Raises TransportError where there is none."""
    return Driver()


def ordinal_of(device: str) -> int:
    """Of "cuda:1" it is 1. Raises TransportError for what is no CUDA device."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        raise TransportError(f"{device} is no CUDA device")
    return int(index or 0)


_P, _U64, _SIZE, _INT, _UINT = (
    *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint),
)
_ARGUMENTS: dict[str, list[Any]] = {
    "cuInit": [_UINT],
    "cuDeviceGetCount": [_P],
    "cuGetErrorName": [_INT, _P],
    "cuCtxPushCurrent_v2": [_P],
    "cuCtxPopCurrent_v2": [_P],
    "cuCtxSynchronize": [],
    "cuCtxEnablePeerAccess": [_P, _UINT],
    "cuDevicePrimaryCtxRetain": [_P, _INT],
    "cuDeviceGetUuid": [_P, _INT],
    "cuDeviceGetUuid_v2": [_P, _INT],
    "cuDeviceCanAccessPeer": [_P, _INT, _INT],
    "cuMemAlloc_v2": [_P, _SIZE],
    "cuMemFree_v2": [_U64],
    "cuMemsetD8_v2": [_U64, ctypes.c_ubyte, _SIZE],
    "cuMemHostAlloc": [_P, _SIZE, _UINT],
    "cuMemFreeHost": [_P],
    "cuMemGetAddressRange_v2": [_P, _P, _U64],
    "cuIpcGetMemHandle": [_P, _U64],
    "cuIpcOpenMemHandle_v2": [_P, _Handle, _UINT],
    "cuIpcCloseMemHandle": [_U64],
    "cuStreamCreateWithPriority": [_P, _UINT, _INT],
    "cuStreamDestroy_v2": [_P],
    "cuStreamWaitEvent": [_P, _P, _UINT],
    "cuEventCreate": [_P, _UINT],
    "cuEventDestroy_v2": [_P],
    "cuEventRecord": [_P, _P],
    "cuEventSynchronize": [_P],
    "cuEventQuery": [_P],
    "cuEventElapsedTime": [_P, _P, _P],
    "cuMemcpyAsync": [_U64, _U64, _SIZE, _P],
    "cuLaunchKernel": [_P, *[_UINT] * 7, _P, _P, _P],
    "cuMemcpyBatchAsync": [_P, _P, _P, _SIZE, _P, _P, _SIZE, _P, _P],
}
