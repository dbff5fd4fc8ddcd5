"""Copies within memory by more than one thread: one core alone moves half of what memory gives.

The caller copies all the while; helpers take pieces beside it. Helpers that get no core take none,
so a busy machine loses nothing but their waking. When `copy` returns or raises, nothing is copied
any more. The interpreter's lock is let go during each piece.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue

from kvxfer.plan import ReadPlan

Piece = tuple[int, int, int]
"""(source byte, destination byte, length)"""

_SHARED_BYTES = 4 << 20
"""Less is copied nearly as soon as a helper wakes."""
_UNIT_BYTES = 256 << 10
"""What a thread takes at once."""


def default_threads() -> int:
    """2 wherever there are two processors, up to 4 on large machines: the others compute."""
    processors = len(os.sched_getaffinity(0))
    return min(4, processors, max(2, processors // 4))


class Copier:
    """`threads` copy at once, the caller's among them; helpers start with the first large copy.

    Safe to share among threads. Helpers end with `close`, or when the copier is gone.
    """

    def __init__(self, threads: int) -> None:
        self._num_helpers = threads - 1
        self._helpers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Help | None] = SimpleQueue()
        weakref.finalize(self, _dismiss, self._queue, self._helpers).atexit = False

    def copy(self, source: int, plan: ReadPlan, destination: int) -> None:
        """What the plan says; both are where block 0 lies in this process."""
        pieces = plan.pieces()
        about = len(plan.src_blocks) * plan.src_block_bytes
        if about < _SHARED_BYTES or not self._num_helpers:
            move = ctypes.memmove
            for src, dst, size in pieces:
                move(destination + dst, source + src, size)
            return
        units = _units(pieces)
        step = max(1, _UNIT_BYTES * len(units) // (plan.num_bytes or 1))
        job = source, destination, units, step, itertools.count(0, step)
        ends = [threading.Lock() for _ in range(self._num_helpers)]
        if not self._helpers:
            self._start()
        for end in ends:
            self._queue.put((end, job))
        try:
            _work(*job)
        finally:
            units.clear()  # a helper that comes now finds nothing
            for end in ends:
                with end:  # one that came before has ended
                    pass

    def close(self) -> None:
        """The helpers have ended afterwards. Idempotent."""
        with self._lock:
            helpers = list(self._helpers)
            _dismiss(self._queue, self._helpers)
        for helper in helpers:
            helper.join()

    def _start(self) -> None:
        with self._lock:
            while len(self._helpers) < self._num_helpers:
                helper = threading.Thread(
                    target=_help, args=(self._queue,), name="kvxfer-copy", daemon=True
                )
                helper.start()
                self._helpers.append(helper)


_Job = tuple[int, int, list[Piece], int, Iterator[int]]
_Help = tuple[threading.Lock, _Job]


def _units(pieces: list[Piece]) -> list[Piece]:
    """The same, none longer than a unit."""
    found = []
    for src, dst, size in pieces:
        while size > _UNIT_BYTES:
            found.append((src, dst, _UNIT_BYTES))
            src, dst, size = src + _UNIT_BYTES, dst + _UNIT_BYTES, size - _UNIT_BYTES
        found.append((src, dst, size))
    return found


def _work(
    source: int, destination: int, units: list[Piece], step: int, numbers: Iterator[int]
) -> None:
    """Copy `step` units at a time until none is left; `numbers` gives each to one thread."""
    move = ctypes.memmove
    for first in numbers:
        some = units[first : first + step]
        if not some:
            return
        for src, dst, size in some:
            move(destination + dst, source + src, size)


def _help(queue: SimpleQueue[_Help | None]) -> None:
    """A helper's life."""
    while (help_ := queue.get()) is not None:
        end, job = help_
        with end:
            _work(*job)
        del help_, end, job


def _dismiss(queue: SimpleQueue[_Help | None], helpers: list[threading.Thread]) -> None:
    for _ in helpers:
        queue.put(None)
    helpers.clear()
