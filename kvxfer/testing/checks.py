"""What the suites ask again and again."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Holdings:
    """What a process has open."""

    files: int
    threads: int
    mappings: int
    others: Mapping[str, int] = field(default_factory=dict)
    """Counts that the caller brought: queue pairs, memory regions."""

    def __le__(self, other: Holdings) -> bool:
        return (
            self.files <= other.files
            and self.threads <= other.threads
            and self.mappings <= other.mappings
            and all(count <= other.others.get(name, 0) for name, count in self.others.items())
        )


def holdings(others: Mapping[str, int] | None = None) -> Holdings:
    """Open files, threads and mapped regions of this process, and `others`."""
    gc.collect()
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        mappings = sum("memfd:kvxfer" in line for line in file)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    return Holdings(files, threading.active_count(), mappings, others or {})


def settles(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def raises(kind: type[Exception], work: Callable[[], object]) -> None:
    """`work` must raise that, or a kind of it."""
    try:
        work()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")
