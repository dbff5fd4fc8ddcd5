"""Shared memory in pages of 2 MiB, where the kernel gives them: copies then search fewer pages.

A memfd's pages are small ones unless the machine's administrator says otherwise; MADV_COLLAPSE
(Linux 6.1) makes large ones of them whatever the settings. Both ends see them if their mappings
begin at multiples of 2 MiB. Memory is taken when blocks are, not before. Where the kernel refuses,
pages stay small and nothing else changes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

LARGE_BYTES = 2 << 20
_COLLAPSE = 25
_FIXED, _NO_RESERVE = 0x10, 0x4000
_WORTH_IT_BYTES = 2 * LARGE_BYTES
_AT_ONCE = 16
"""Pages: each call has the kernel wait for all processors once."""


def map_shared(fd: int, size: int, *, writable: bool) -> int:
    """Where `size` bytes of this file lie in our memory from now on. Raises OSError."""
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if size < _WORTH_IT_BYTES:
        return _mmap(None, max(size, 1), prot, mmap.MAP_SHARED, fd)
    around = size + LARGE_BYTES
    room = _mmap(None, around, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1)
    try:
        where = _mmap(
            -(-room // LARGE_BYTES) * LARGE_BYTES, size, prot, mmap.MAP_SHARED | _FIXED, fd
        )
    except OSError:
        unmap(room, around)
        raise
    end = -(-(where + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    for first, last in ((room, where), (end, room + around)):
        if first < last:
            unmap(first, last - first)
    return where


def unmap(where: int, size: int) -> None:
    """What `map_shared` mapped."""
    libc().munmap(where, max(size, 1))


def shared_buffer(fd: int, size: int) -> Any:
    """A buffer over the file, which is unmapped when the last view of it goes. Raises OSError."""
    where = map_shared(fd, size, writable=True)
    buffer = (ctypes.c_char * size).from_address(where)
    weakref.finalize(buffer, unmap, where, size).atexit = False  # a thread may still read then
    return buffer


class LargePages:
    """Makes large pages of a mapping at `where`, piece by piece as it is put to use."""

    def __init__(self, where: int, size: int) -> None:
        self._where = where
        self._count = size // LARGE_BYTES if size >= _WORTH_IT_BYTES else 0
        """Large pages that there can be."""
        self._todo = set(range(-(-self._count // _AT_ONCE)))
        """Runs of so many that were not asked for yet."""

    def use(self, first_bytes: Iterable[int], size: int) -> None:
        """Pieces of `size` bytes that begin there are about to be written."""
        if not self._todo:
            return
        run_bytes = _AT_ONCE * LARGE_BYTES
        for first in first_bytes:
            for run in range(first // run_bytes, (first + size - 1) // run_bytes + 1):
                if run in self._todo:
                    self._todo.discard(run)
                    self._collapse(run)

    def _collapse(self, run: int) -> None:
        pages = range(run * _AT_ONCE, min(self._count, (run + 1) * _AT_ONCE))
        for page in pages:
            ctypes.string_at(self._where + page * LARGE_BYTES, 1)  # the kernel passes empty ones by
        first = self._where + pages.start * LARGE_BYTES
        refused = libc().madvise(first, len(pages) * LARGE_BYTES, _COLLAPSE)
        if refused and ctypes.get_errno() == errno.EINVAL:  # it does not know how
            self._todo.clear()


def _mmap(where: int | None, size: int, prot: int, flags: int, fd: int) -> int:
    found = libc().mmap(where, size, prot, flags, fd, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


@cache
def libc() -> Any:
    """mmap by hand: the standard library's chooses no address and gives none."""
    found = ctypes.CDLL(None, use_errno=True)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
    ]
    found.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
