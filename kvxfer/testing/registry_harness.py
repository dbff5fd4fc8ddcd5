"""What the registries' suites stand on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvxfer.registry import Claim, Publication, Registry

T = TypeVar("T")
LONG_S = 60.0
SHORT_S = 0.15


class RegistryHarness:
    """Subclass a suite; give `make` (an empty registry at each call) and `empty`."""

    def make(self) -> Registry:
        """A registry without entries."""
        raise NotImplementedError

    def empty(self, registry: Registry) -> None:
        """Take everything away, as an administrator or a crash would."""
        raise NotImplementedError


def item(i: int, host: str = "a", producer: str = "p") -> Publication:
    """100 bytes of KV."""
    return Publication(f"i{i}", producer, host, 100, b"d%d" % i)


def of(claim: Claim) -> tuple[str, int]:
    """As renew, release and fail want it."""
    return claim.id, claim.fence


def wait(seconds: float) -> None:
    """Let a lease run; leases are time, so a test of them has to."""
    threading.Event().wait(seconds)


def eventually(work: Callable[[], T], timeout_s: float = 10.0) -> T:
    """What `work` gives once that is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := work()):
        assert time.monotonic() < deadline, "it never came true"
        wait(0.01)
    return found
