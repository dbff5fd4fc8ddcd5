"""How much the reads of one end may take of the memory that its engine works in.

What comes over a fast link is written to memory that a decode step reads from at the same time,
and slows it by about the share that it takes. Each read goes as fast as the link; the next one
waits until, on average, no more came than was allowed.
"""

from __future__ import annotations

import threading
import time

from kvxfer.errors import TransferTimeout


class Pace:
    """`bytes_per_s` may be changed at any time; 0: no limit. Safe to share among threads."""

    def __init__(self, bytes_per_s: float = 0) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, num_bytes: int, timeout_s: float) -> None:
        """Until a read of so many bytes may begin. Raises TransferTimeout, without waiting, where
        that is later than `timeout_s` from now."""
        if self.bytes_per_s <= 0:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            if begin - now > timeout_s:
                raise TransferTimeout(f"reads before this one take {begin - now:.3f} s")
            self._free_at = begin + num_bytes / self.bytes_per_s
        if begin > now:
            time.sleep(begin - now)
