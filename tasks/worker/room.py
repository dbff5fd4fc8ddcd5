"""How much more a decode worker may claim: places, blocks and bytes.

The engine's own counts come twice a second; what was claimed since is kept here, so that a
worker never claims on the same free blocks twice. Claiming too much does no harm (an adoption
without room waits in the engine), only keeps it from others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from pdbatch.engine.messages import EngineInfo, Stats

RESERVED_SHARE = 0.1
"""Of the blocks, left for sequences to grow into."""


@dataclass(slots=True)
class Room:
    """Safe among threads."""

    info: EngineInfo
    max_seqs: int
    _sizes: dict[str, int] = field(default_factory=dict)
    """Blocks by hand-off, from its claim until its pull ended."""
    _inside: set[str] = field(default_factory=set)
    """Keys from their claim until their row or their failure."""
    _free_blocks: int = 0
    _held: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._free_blocks = self.info.num_blocks

    def update(self, stats: Stats) -> None:
        """What the engine says of itself."""
        self._free_blocks = stats.free_blocks
        self._held = stats.held

    def left(self) -> tuple[int, int]:
        """(requests, bytes) that may be claimed now: none while the engine keeps its free blocks
        for what it has, since others may have room."""
        with self._lock:
            if self._held and self._inside:
                return 0, 0
            reserved = int(self.info.num_blocks * RESERVED_SHARE) if self._inside else 0
            blocks = self._free_blocks - sum(self._sizes.values()) - reserved
            count = self.max_seqs - len(self._inside)
            return max(0, count), max(0, blocks) * self.info.block_bytes

    def has(self, key: str) -> bool:
        """Whether the request is here, or on its way."""
        return key in self._inside

    def is_pulling(self, handoff_id: str) -> bool:
        """Whether this very hand-off is on its way."""
        return handoff_id in self._sizes

    def claimed(self, handoff_id: str, key: str, num_bytes: int) -> None:
        """A claim is on its way to the engine."""
        with self._lock:
            self._sizes[handoff_id] = -(-num_bytes // self.info.block_bytes)
            self._inside.add(key)

    def pulled(self, handoff_ids: Iterable[str]) -> None:
        """Their blocks are in the engine's counts from now on."""
        with self._lock:
            for handoff_id in handoff_ids:
                self._free_blocks -= self._sizes.pop(handoff_id, 0)

    def gone(self, key: str, handoff_id: str | None = None) -> None:
        """A request ended, or never came."""
        with self._lock:
            self._inside.discard(key)
            if handoff_id is not None:
                self._sizes.pop(handoff_id, None)

    @property
    def is_empty(self) -> bool:
        """Whether no request is here or on its way."""
        return not self._inside

    def inside(self) -> list[str]:
        """Requests from their claim to their end."""
        with self._lock:
            return list(self._inside)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._sizes.clear()
            self._inside.clear()
            self._free_blocks = self.info.num_blocks
