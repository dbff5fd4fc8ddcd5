"""A lane: what one read at a time needs on one device.

A stream of its own, so that neither the engine's work waits for a read nor a read for it; events
to wait for; page-locked and device memory for the kernel's table. A read that goes by two streams
has a second lane beside it. Lanes are kept for the next read: there are as many as there were
reads at once.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvxfer.cuda.driver import Driver, driver
from kvxfer.errors import TransportError

_LEAST_WORDS = 2048


class Lane:
    """Used by one thread at a time. Raises TransportError, MemoryError."""

    def __init__(self, device: int, *, priority: int = 0) -> None:
        self.device = device
        self._cuda = cuda = driver()
        with cuda.current(device):
            self.stream = cuda.stream(priority)
            self._sleeps, self._spins = cuda.event(), cuda.event(sleeps=False)
        held = (self.stream, self._sleeps, self._spins)
        self._release = weakref.finalize(self, _release, cuda, device, *held)
        self._release.atexit = False
        self._host: Any = None
        self._table: Any = None
        self._beside: Lane | None = None
        self._is_split = False
        self._mark = 0

    def table(self, words: array[int]) -> Any:
        """The words as a tensor on the device, from here on in the stream's order."""
        import torch

        if self._table is None or len(self._table) < len(words):
            size = max(_LEAST_WORDS, 1 << (len(words) - 1).bit_length())
            self._host = torch.empty(size, dtype=torch.int64, pin_memory=True)
            self._table = torch.empty(size, dtype=torch.int64, device=f"cuda:{self.device}")
        num_bytes = 8 * len(words)
        ctypes.memmove(self._host.data_ptr(), words.buffer_info()[0], num_bytes)
        self._cuda.copy(self._table.data_ptr(), self._host.data_ptr(), num_bytes, self.stream)
        return self._table

    def beside(self) -> Lane:
        """A second one for another part of the same read, until the next `wait` or `join`.

        What it is given does not wait for what this one has.
        """
        if self._beside is None:
            self._beside = Lane(self.device)
        self._is_split = True
        return self._beside

    def mark(self, lane: Lane) -> None:
        """`wait` sleeps until `lane` (this one or the one beside) has done what it has now, and
        waits for the rest on a processor."""
        self._mark = lane.record()

    def join(self) -> None:
        """What this one gets from now on waits for the one beside it too."""
        if self._is_split and self._beside is not None:
            self._cuda.follow(self.stream, self._beside.record())
        self._is_split, self._mark = False, 0

    def record(self, *, briefly: bool = False) -> int:
        """An event that happens when what the stream has now is done. `briefly`: who waits for it
        does so on a processor, which is sooner by the time that waking takes."""
        event = self._spins if briefly else self._sleeps
        self._cuda.record(event, self.stream)
        return event

    def wait(self, *, briefly: bool = False) -> None:
        """Until all that this one and the one beside it have is done; the interpreter's lock is
        let go."""
        mark, self._mark = self._mark, 0
        briefly = briefly or bool(mark)
        events = [self.record(briefly=briefly)]
        if self._is_split and self._beside is not None:
            events.append(self._beside.record(briefly=briefly))
            self._is_split = False
        if mark:
            self._cuda.wait(mark)
        for event in events:
            self._cuda.wait(event)

    def close(self) -> None:
        """Give back the stream and the events. Idempotent."""
        self._release()
        self._host = self._table = None
        if self._beside is not None:
            self._beside.close()
            self._beside = None


def _release(cuda: Driver, device: int, stream: int, *events: int) -> None:
    with cuda.current(device):
        for event in events:
            cuda.destroy_event(event)
        cuda.destroy_stream(stream)


class Lanes:
    """The idle lanes of one device. Safe to share among threads."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._idle: list[Lane] = []
        self._lock = threading.Lock()
        self._closes = 0

    @contextmanager
    def use(self) -> Iterator[Lane]:
        """A lane, with its device's context current in this thread.

        After an error nothing of the lane's work is under way any more, as far as the device can
        still say.
        """
        with driver().current(self.device):
            with self._lock:
                lane = self._idle.pop() if self._idle else None
                closes = self._closes
            lane = lane or Lane(self.device)
            try:
                yield lane
            except BaseException:
                with suppress(TransportError):  # what failed is told by the first error
                    lane.wait()
                lane.close()
                raise
            with self._lock:
                if closes == self._closes:
                    self._idle.append(lane)
                    return
            lane.close()

    def close(self) -> None:
        """Give back those that are idle; the others go when their reads end."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._closes += 1
        for lane in idle:
            lane.close()
