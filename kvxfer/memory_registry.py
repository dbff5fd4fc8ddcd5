"""The registry within one process, for tests and for engines that share one."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvxfer.registry import Claim, Ended, EndKind, Publication


@dataclass(slots=True)
class _Entry:
    item: Publication
    lease_until: float
    fence: int = 0
    claim_until: float | None = None


class MemoryRegistry:
    """`kvxfer.registry.Registry`; `clock` counts seconds, tests bring their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._ended: defaultdict[str, deque[Ended]] = defaultdict(deque)
        self._fence = 0
        self._news = threading.Condition()

    def publish(self, items: Sequence[Publication], lease_s: float) -> None:
        """See `Registry`."""
        with self._news:
            for item in items:
                entry = self._entries.setdefault(item.id, _Entry(item, 0.0))
                entry.lease_until = self._clock() + lease_s

    def claim(
        self, consumer: str, host: str, max_count: int, max_bytes: int, lease_s: float
    ) -> list[Claim]:
        """See `Registry`."""
        with self._news:
            self._expire()
            ready = [entry for entry in self._entries.values() if entry.claim_until is None]
            ready.sort(key=lambda entry: entry.item.host != host)  # stable: oldest first
            claims: list[Claim] = []
            for entry in ready[: max(0, max_count)]:
                if claims and entry.item.num_bytes > max_bytes:
                    break
                max_bytes -= entry.item.num_bytes
                self._fence += 1
                entry.fence, entry.claim_until = self._fence, self._clock() + lease_s
                claims.append(Claim(*_claimed(entry)))
            return claims

    def renew(self, claims: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """See `Registry`."""
        with self._news:
            self._expire()
            lost = []
            for id_, fence in claims:
                entry = self._owned(id_, fence)
                if entry is None:
                    lost.append(id_)
                else:
                    entry.claim_until = self._clock() + lease_s
            return lost

    def release(self, claims: Iterable[tuple[str, int]]) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "released", "")

    def fail(self, claims: Iterable[tuple[str, int]], reason: str) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "failed", reason)

    def collect(self, producer: str, timeout_s: float) -> list[Ended]:
        """See `Registry`."""
        with self._news:
            self._expire()
            self._news.wait_for(lambda: bool(self._ended[producer]), timeout_s)
            return list(self._ended.pop(producer, ()))

    def renew_published(self, producer: str, ids: Iterable[str], lease_s: float) -> list[str]:
        """See `Registry`."""
        with self._news:
            self._expire()
            unknown = []
            for id_ in ids:
                if id_ in self._entries:
                    self._entries[id_].lease_until = self._clock() + lease_s
                else:
                    unknown.append(id_)
            return unknown

    def withdraw(self, producer: str, ids: Iterable[str]) -> None:
        """See `Registry`."""
        with self._news:
            for id_ in ids:
                self._entries.pop(id_, None)

    def missing(self, producer: str, ids: Iterable[str]) -> list[str]:
        """See `Registry`."""
        with self._news:
            ended = {end.id for end in self._ended[producer]}
            return [id_ for id_ in ids if id_ not in self._entries and id_ not in ended]

    def sweep(self) -> int:
        """See `Registry`."""
        with self._news:
            return self._expire()

    def depth(self) -> int:
        """See `Registry`."""
        with self._news:
            self._expire()
            return sum(entry.claim_until is None for entry in self._entries.values())

    def clear(self) -> None:
        """Forget everything, as a registry that was emptied."""
        with self._news:
            self._entries.clear()
            self._ended.clear()

    def _owned(self, id_: str, fence: int) -> _Entry | None:
        entry = self._entries.get(id_)
        return entry if entry and entry.claim_until is not None and entry.fence == fence else None

    def _end(self, claims: Iterable[tuple[str, int]], kind: EndKind, reason: str) -> list[str]:
        with self._news:
            self._expire()
            refused = []
            for id_, fence in claims:
                if self._owned(id_, fence) is None:
                    refused.append(id_)
                    continue
                producer = self._entries.pop(id_).item.producer
                self._ended[producer].append(Ended(id_, kind, reason))
            self._news.notify_all()
            return refused

    def _expire(self) -> int:
        now, count = self._clock(), 0
        for id_, entry in list(self._entries.items()):
            if entry.lease_until <= now:
                del self._entries[id_]
                self._ended[entry.item.producer].append(Ended(id_, "expired", "lease expired"))
                count += 1
            elif entry.claim_until is not None and entry.claim_until <= now:
                entry.claim_until = None
                count += 1
        if count:
            self._news.notify_all()
        return count


def _claimed(entry: _Entry) -> tuple[str, int, int, bytes]:
    return entry.item.id, entry.fence, entry.item.num_bytes, entry.item.descriptor
